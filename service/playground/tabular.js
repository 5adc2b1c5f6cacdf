// Trying a tabular model: a slider and a number for every feature, a threshold, and a chart of live predictions.

import { post } from "./api.js";
import { buildChart } from "./charts.js";
import { h, oneAtATime, onRecovered, show } from "./dom.js";
import { buildResult } from "./result.js";

/** Return the panels to try `model` with. */
export function buildTabularPlay(model, card, wire, compare) {
  const result = buildResult(model);
  const features = model.input.features.map((feature) => ({ ...feature, ...chooseRange(feature) }));
  const state = {
    values: features.map(({ low, high }) => (low === null ? null : Number(show((low + high) / 2)))),
    threshold: model.threshold,
    active: 0, // the feature moved last, which a curve is drawn along
  };

  const update = oneAtATime(async () => {
    if (state.values.includes(null)) {
      result.clear(`Enter a number for ${features.filter((_, index) => state.values[index] === null).map(({ name }) => name).join(", ")}.`);
      return;
    }
    const instance = Object.fromEntries(features.map((feature, index) => [feature.name, state.values[index]]));
    const body = { instances: [instance] };
    if (model.task === "binary" && state.threshold !== model.threshold) body.parameters = { threshold: state.threshold };
    try {
      const { answer, text, ms } = await post(`${model.path}:predict`, JSON.stringify(body));
      result.show(answer.predictions[0], ms);
      wire.exchange({ body }, text);
      compare.show(JSON.stringify({ instances: body.instances }));
      await chart?.show(state, answer.predictions[0]);
    } catch (problem) {
      result.problem(problem.message);
    }
  });
  const rows = features.map((feature, index) =>
    buildFeature(feature, index, state.values[index], (value) => {
      state.values[index] = value;
      state.active = index;
      update();
    }),
  );
  const setValues = (values) => {
    state.values = values.map(Number);
    rows.forEach((row, index) => row.set(state.values[index]));
    update();
  };
  const isDrawn = ["value", "interval"].includes(model.output.kind) || ["binary", "multiclass"].includes(model.task);
  const chart = isDrawn ? buildChart(model, features, setValues) : null;
  const input = h("section", { class: "panel features", "aria-label": "Input" },
    rows.map((row) => row.element),
    model.task === "binary" ? buildThreshold(model, state, update) : null,
    card.golden ? buildSamples(card.golden.inputs, features, setValues) : null,
  );
  if (chart) chart.element.hidden = true;
  update();
  onRecovered(input, update);
  return h("div", { class: "play" }, input, h("div", { class: "column" }, result.element, chart?.element, compare.element));
}

/** Return the range of a slider, which the training data covered; nulls where it is not known. */
function chooseRange({ minimum, maximum }) {
  if (typeof minimum !== "number" || typeof maximum !== "number") return { low: null, high: null };
  return { low: minimum, high: maximum > minimum ? maximum : minimum + 1 };
}

function buildFeature(feature, index, value, onchange) {
  const { name, unit, description, low, high } = feature;
  const id = `feature-${index}`;
  const step = 10 ** Math.floor(Math.log10((high - low) / 100));
  const slider = low === null ? null : h("input", {
    type: "range", id: `${id}-slider`, min: low, max: high, step, "aria-label": `${name}, slider`,
    oninput: () => {
      number.value = slider.value;
      onchange(Number(slider.value));
    },
  });
  const number = h("input", {
    type: "number", id, step: "any", inputmode: "decimal", "aria-describedby": `${id}-range`,
    oninput: () => {
      if (number.value === "" || !Number.isFinite(number.valueAsNumber)) return;
      if (slider) slider.value = number.value;
      onchange(number.valueAsNumber);
    },
  });
  const set = (given) => {
    number.value = Number(given.toPrecision(6));
    if (slider) slider.value = given;
  };
  if (value !== null) set(value);
  const about = description && description !== name ? `${description}; ` : "";
  return {
    set,
    element: h("div", { class: "feature" },
      h("label", { for: id }, name), h("span", { class: "entry" }, number, unit ? h("span", { class: "unit" }, unit) : null),
      slider, h("p", { class: "hint", id: `${id}-range` }, low === null ? `${about}any number` : `${about}${show(low)} to ${show(high)}${unit ? ` ${unit}` : ""}`)),
  };
}

/** Return the slider of a binary model's threshold, which sets `state.threshold`. */
export function buildThreshold(model, state, update) {
  const shown = h("output", { for: "threshold" });
  const slider = h("input", {
    type: "range", id: "threshold", min: 0, max: 1, step: 0.01, value: model.threshold,
    oninput: () => {
      state.threshold = Number(slider.value);
      shown.textContent = slider.value;
      update();
    },
  });
  shown.textContent = String(model.threshold);
  return h("div", { class: "feature threshold" },
    h("label", { for: "threshold" }, "Threshold"), shown, slider,
    h("p", { class: "hint" }, `“${model.labels[1]}” is said from this probability on; the model's own is ${model.threshold}`));
}

function buildSamples(inputs, features, setValues) {
  const buttons = inputs.slice(0, 6).map((row) =>
    h("button", {
      type: "button", class: "chip", "aria-label": `Sample: ${features.map(({ name }, index) => `${name} ${show(row[index])}`).join(", ")}`,
      onclick: () => setValues(row),
    }, row.slice(0, 4).map((value) => show(Number(value.toPrecision(3)))).join(", ") + (row.length > 4 ? ", …" : "")),
  );
  return h("div", { class: "samples", role: "group", "aria-label": "Samples" }, buttons);
}
