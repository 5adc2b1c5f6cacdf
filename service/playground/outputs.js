// What a model answers, in words, and in rows of name and value.

import { percent, show } from "./dom.js";

const MOST = 8; // numbers of a vector that are shown
const unitOf = ({ unit }) => (unit ? ` ${unit}` : "");

/** Return `{big, small, rows}` of a prediction: the headline, what is below it, and pairs of name and text. */
export function describeOutput(model, prediction) {
  const { output } = model;
  if (model.task === "multilabel") return { big: prediction.labels.join(", ") || "none", small: `of ${model.labels.length} labels`, rows: [] };
  if (prediction.label !== undefined) {
    return { big: prediction.label, small: `with probability ${percent(prediction.probabilities[prediction.prediction])}`, rows: [] };
  }
  if (output.kind === "value") return { big: `${show(prediction.prediction)}${unitOf(output)}`, small: output.name, rows: [] };
  if (output.kind === "values") {
    const rows = output.values.map((value) => [value.name, `${show(prediction.prediction[value.name])}${unitOf(value)}`]);
    return { big: rows.length > 2 ? `${rows.length} values` : rows.map(([, text]) => text).join(", "), small: rows.map(([name]) => name).join(", "), rows };
  }
  if (output.kind === "interval") {
    const [low, high] = prediction.interval.map(show);
    const share = output.level ? `, in ${Math.round(100 * output.level)} % of cases` : "";
    return { big: `${show(prediction.prediction)}${unitOf(output)}`, small: `${output.name}; ${low} to ${high}${unitOf(output)}${share}`, rows: [] };
  }
  if (output.kind === "vector") {
    const vector = prediction.embedding;
    const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
    const rows = vector.slice(0, MOST).map((value, index) => [String(index), show(value)]);
    return { big: `${vector.length} numbers`, small: `of length ${show(length)}${vector.length > MOST ? `; the first ${MOST}` : ""}`, rows };
  }
  const rows = output.outputs.map((named) => [named.name, `${showTensor(prediction.outputs[named.name])}${unitOf(named)}`]);
  return { big: `${rows.length} ${rows.length === 1 ? "output" : "outputs"}`, small: rows.map(([name]) => name).join(", "), rows };
}

/** Return a nested list of numbers as a person reads it, shortened. */
function showTensor(value) {
  if (typeof value === "number") return show(value);
  if (!Array.isArray(value)) return String(value);
  return `[${value.slice(0, MOST).map(showTensor).join(", ")}${value.length > MOST ? `, … ${value.length} in all` : ""}]`;
}
