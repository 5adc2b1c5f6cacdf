// The decision over two features, with the point that is asked about.

import { buildLegend, channels, classColour, h, onScheme, percent, show } from "./dom.js";

const SIDE = 320; // pixels of the painted map
const MOST = 12; // labels in the legend
const LEAST = 1e-7; // a probability of float32 is not known more precisely

/** Return the figure's element, its caption, and `draw(values, state, prediction)` for values (side², K). */
export function buildMap(model, features, setValues) {
  const [across, up] = features;
  const canvas = h("canvas", { width: SIDE, height: SIDE, class: "map", role: "img" });
  const point = h("span", { class: "map-point" });
  const field = h("div", { class: "map-field" }, canvas, point);
  const legend = h("div", { class: "map-legend" });
  let last = null;

  const choose = (event) => {
    const box = canvas.getBoundingClientRect();
    const part = [(event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height];
    setValues(features.map(({ low, high }, axis) => Number((low + Math.min(Math.max(part[axis], 0), 1) * (high - low)).toPrecision(4))));
  };
  field.addEventListener("pointerdown", (event) => {
    field.setPointerCapture(event.pointerId);
    choose(event);
  });
  field.addEventListener("pointermove", (event) => field.hasPointerCapture(event.pointerId) && choose(event));

  const draw = (values, state, prediction) => {
    const part = features.map(({ low, high }, axis) => (state.values[axis] - low) / (high - low));
    point.style.left = `${100 * part[0]}%`;
    point.style.top = `${100 * (1 - part[1])}%`;
    point.hidden = part.some((each) => each < 0 || each > 1);
    const key = `${state.threshold}`;
    if (last?.values !== values || last.key !== key) paint(canvas, values, model, state.threshold, legend);
    last = { values, key, threshold: state.threshold };
    const where = features.map(({ name }, axis) => `${name} ${show(state.values[axis])}`).join(" and ");
    const found = prediction.label ? `${prediction.label}, probability ${percent(prediction.probabilities[prediction.prediction])}` : show(prediction.prediction);
    canvas.setAttribute("aria-label", `Map of predictions over ${across.name} and ${up.name}; at ${where}: ${found}`);
  };
  onScheme(canvas, () => last && paint(canvas, last.values, model, last.threshold, legend));
  return { element: layOut(field, across, up, legend), caption: "What the model says everywhere, from live predictions. Click or drag to move the point.", draw };
}

function layOut(field, across, up, legend) {
  const name = ({ name: text, unit }) => (unit ? `${text} (${unit})` : text);
  const tick = (value) => h("span", { class: "tick" }, show(value));
  return h("div", { class: "map-box" },
    h("div", { class: "map-up" }, tick(up.high), h("span", { class: "axis" }, name(up)), tick(up.low)),
    field,
    h("div", { class: "map-across" }, tick(across.low), h("span", { class: "axis" }, name(across)), tick(across.high)),
    legend);
}

/** Paint every pixel from the four predictions around it, and list the labels that are predicted somewhere. */
function paint(canvas, values, model, threshold, legend) {
  const side = Math.round(Math.sqrt(values.length));
  const context = canvas.getContext("2d");
  const picture = context.createImageData(SIDE, SIDE);
  const decide = chooseColour(model, values, threshold);
  const scale = model.task === "regression" ? values : values.map((row) => row.map((value) => Math.log(Math.max(value, LEAST))));
  const areas = new Map();
  for (let y = 0; y < SIDE; y += 1) {
    const v = (y / (SIDE - 1)) * (side - 1);
    for (let x = 0; x < SIDE; x += 1) {
      const u = (x / (SIDE - 1)) * (side - 1);
      const { colour, index } = decide(between(scale, side, u, v));
      picture.data.set(colour, 4 * (y * SIDE + x));
      areas.set(index, (areas.get(index) ?? 0) + 1);
    }
  }
  context.putImageData(picture, 0, 0);
  legend.replaceChildren(listAreas(model, areas));
}

function listAreas(model, areas) {
  if (model.task === "regression") return h("p", { class: "legend" }, "Deeper colour is a larger value.");
  if (model.task === "binary") return buildLegend(model.labels.map((label, index) => [index, label]));
  const largest = [...areas].sort((a, b) => b[1] - a[1]).slice(0, MOST).map(([index]) => index);
  return buildLegend(largest.sort((a, b) => a - b).map((index) => [index, model.labels[index]]));
}

/** Return the row at a place between four: of logarithms, so that a straight boundary stays straight. */
function between(values, side, u, v) {
  const [left, top] = [Math.min(Math.floor(u), side - 2), Math.min(Math.floor(v), side - 2)];
  const [a, b] = [u - left, v - top];
  const corner = top * side + left;
  const [p, q, r, s] = [values[corner], values[corner + 1], values[corner + side], values[corner + side + 1]];
  return p.map((_, k) => (p[k] * (1 - a) + q[k] * a) * (1 - b) + (r[k] * (1 - a) + s[k] * a) * b);
}

function mix(from, to, part) {
  return [0, 1, 2].map((index) => Math.round(from[index] + (to[index] - from[index]) * part)).concat(255);
}

/** Return a function from a row to its colour and its label's index: paler where it is unsure; a ramp for a number. */
function chooseColour(model, values, threshold) {
  const paper = channels("field");
  const colours = (model.task === "regression" ? [0] : model.labels).map((_, index) => classColour(index));
  if (model.task === "regression") {
    const all = values.map((row) => row[0]);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    return ([value]) => ({ index: 0, colour: mix(paper, colours[0], (value - low) / (high - low || 1)) });
  }
  const known = (logs) => {
    const best = Math.max(...logs);
    const powers = logs.map((value) => Math.exp(value - best));
    const sum = powers.reduce((total, value) => total + value, 0);
    return powers.map((value) => value / sum);
  };
  if (model.task === "binary") {
    return (logs) => {
      const value = known(logs)[1];
      const on = value >= threshold;
      const part = on ? (value - threshold) / (1 - threshold || 1) : (threshold - value) / (threshold || 1);
      return { index: Number(on), colour: mix(paper, colours[Number(on)], 0.25 + 0.65 * Math.min(part, 1)) };
    };
  }
  return (logs) => {
    const row = known(logs);
    const best = row.indexOf(Math.max(...row));
    return { index: best, colour: mix(paper, colours[best], 0.15 + 0.75 * row[best]) };
  };
}
