// The value, or the probability of each label, along one feature.

import { buildLegend, classColour, h, onScheme, percent, show, svg } from "./dom.js";

const [WIDE, TALL] = [360, 260];
const ROOM = { left: 46, right: 12, top: 12, bottom: 40 };
const MOST = 6; // lines

/** Return the figure's element, its caption, and `draw(values, state, prediction)` for values (points, K). */
export function buildCurve(model, features) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img", class: "curve" });
  const regression = model.task === "regression";
  const many = features.length > 1 ? " Move a feature to see the curve along it; the others stay." : "";
  const what = regression ? model.output.name : model.task === "binary" ? `probability of “${model.labels[1]}”` : "probability of each label";

  const legend = h("div", null);
  const draw = (values, state, prediction) => {
    const feature = features[state.active];
    const lines = chooseLines(model, values);
    const [low, high] = regression ? widen(lines[0].points) : [0, 1];
    const at = {
      x: (value) => ROOM.left + ((value - feature.low) / (feature.high - feature.low)) * (WIDE - ROOM.left - ROOM.right),
      y: (value) => TALL - ROOM.bottom - ((value - low) / (high - low)) * (TALL - ROOM.top - ROOM.bottom),
    };
    const here = state.values[state.active];
    drawing.replaceChildren(
      ...drawAxes(at, [feature.low, feature.high], [low, high], feature),
      ...(model.task === "binary" ? drawThreshold(at, feature, state.threshold) : []),
      ...lines.map((line) => drawLine(at, feature, line, lines.length > 1)),
      ...drawPoint(at, here, feature, lines, prediction),
    );
    if (lines.length > 1) legend.replaceChildren(buildLegend(lines.map(({ index }) => [index, model.labels[index]])));
    const value = regression ? show(prediction.prediction) : percent(prediction.probability);
    drawing.setAttribute("aria-label", `Curve of ${what} over ${feature.name}; at ${show(here)} it is ${value}`);
  };
  let again = null;
  onScheme(drawing, () => again?.());
  return { element: h("div", { class: "chart-box" }, drawing, legend), caption: `How ${regression ? "" : "the "}${what} changes with the input, from live predictions.${many}`, draw(...given) {
    again = () => draw(...given);
    again();
  } };
}

function chooseLines(model, values) {
  const line = (index) => ({ index, points: values.map((row) => row[index]) });
  if (model.task !== "multiclass") return [line(model.task === "binary" ? 1 : 0)];
  const highest = model.labels.map((_, index) => Math.max(...values.map((row) => row[index])));
  const chosen = [...highest.keys()].sort((a, b) => highest[b] - highest[a]).slice(0, MOST);
  return chosen.sort((a, b) => a - b).map(line);
}

function widen(points) {
  const [low, high] = [Math.min(...points), Math.max(...points)];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - room, high + room];
}

/** Return round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= raw) ?? 10);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  return found;
}

function drawAxes(at, [left, right], [low, high], feature) {
  const parts = [];
  for (const value of ticks(low, high, 5)) {
    parts.push(svg("line", { class: "grid", x1: at.x(left), x2: at.x(right), y1: at.y(value), y2: at.y(value) }));
    parts.push(svg("text", { class: "tick", x: ROOM.left - 8, y: at.y(value) + 4, "text-anchor": "end" }, show(value)));
  }
  for (const value of ticks(left, right, 5)) {
    parts.push(svg("text", { class: "tick", x: at.x(value), y: TALL - ROOM.bottom + 18, "text-anchor": "middle" }, show(value)));
  }
  const name = feature.unit ? `${feature.name} (${feature.unit})` : feature.name;
  parts.push(svg("text", { class: "axis", x: (at.x(left) + at.x(right)) / 2, y: TALL - 4, "text-anchor": "middle" }, name));
  return parts;
}

function drawThreshold(at, feature, threshold) {
  const [x, y] = [at.x(feature.low), at.y(threshold)];
  const wide = at.x(feature.high) - x;
  return [
    svg("rect", { class: "above", x, y: at.y(1), width: wide, height: Math.max(0, y - at.y(1)) }),
    svg("line", { class: "threshold-line", x1: x, x2: x + wide, y1: y, y2: y }),
  ];
}

function drawLine(at, feature, { points, index }, coloured) {
  const step = (feature.high - feature.low) / (points.length - 1);
  const path = points.map((value, n) => `${n ? "L" : "M"}${at.x(feature.low + n * step).toFixed(1)} ${at.y(value).toFixed(1)}`);
  const line = svg("path", { class: "line", d: path.join("") });
  if (coloured) line.style.stroke = `rgb(${classColour(index).join(" ")})`;
  return line;
}

function drawPoint(at, here, feature, lines, prediction) {
  if (here < feature.low || here > feature.high) return [];
  const value = prediction.probabilities
    ? lines.length > 1 ? Math.max(...prediction.probabilities) : prediction.probability
    : prediction.prediction;
  const [x, y] = [at.x(here), at.y(value)];
  return [
    svg("line", { class: "drop", x1: x, x2: x, y1: y, y2: TALL - ROOM.bottom }),
    svg("circle", { class: "point", cx: x, cy: y, r: 6 }),
  ];
}
