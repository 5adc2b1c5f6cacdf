// Charts of live predictions: a curve along one feature, or a map over two.

import { post } from "./api.js";
import { buildCurve } from "./curve.js";
import { h } from "./dom.js";
import { buildMap } from "./map.js";

const CURVE_POINTS = 101;
const MAP_SIDE = 41; // 1,681 predictions in one request

/** Return the figure, with `show(state, prediction)`; `setValues` is called when a point on the map is chosen. */
export function buildChart(model, features, setValues) {
  const two = features.length === 2;
  const view = two ? buildMap(model, features, setValues) : buildCurve(model, features);
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const cache = { key: null, values: null };

  const element = h("figure", { class: "panel chart" }, view.element, problem, h("figcaption", null, view.caption));
  return {
    element,
    async show(state, prediction) {
      element.hidden = features.some(({ low }, index) => low === null && (two || index === state.active));
      if (element.hidden) return; // there is no range to draw
      const key = two ? "map" : JSON.stringify([state.active, state.values.filter((_, index) => index !== state.active)]);
      try {
        if (cache.key !== key) {
          const instances = two ? gridOf(features) : rowsAlong(features, state);
          const { answer } = await post(`${model.path}:predict`, JSON.stringify({ instances }));
          Object.assign(cache, { key, values: answer.predictions.map((each) => each.probabilities ?? [each.prediction]) });
        }
        problem.hidden = true;
        view.draw(cache.values, state, prediction);
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = false;
      }
    },
  };
}

function spread(low, high, count) {
  return Array.from({ length: count }, (_, index) => low + ((high - low) * index) / (count - 1));
}

function rowsAlong(features, { active, values }) {
  const { low, high } = features[active];
  return spread(low, high, CURVE_POINTS).map((value) => values.map((own, index) => (index === active ? value : own)));
}

/** Return rows from the top (the second feature's maximum) down, each from left to right. */
function gridOf([across, up]) {
  const columns = spread(across.low, across.high, MAP_SIDE);
  return spread(up.high, up.low, MAP_SIDE).flatMap((y) => columns.map((x) => [x, y]));
}
