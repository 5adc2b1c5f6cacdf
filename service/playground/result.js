// The answer in words and bars.

import { announce, h, percent, show } from "./dom.js";
import { describeOutput } from "./outputs.js";

const MOST = 12; // bars; with more labels than this, the most probable ones are shown

/** Return the panel with `show(prediction, ms)`, `problem(sentence)` and `clear(text)`. */
export function buildResult(model) {
  const headline = h("p", { class: "headline" });
  const detail = h("p", { class: "detail" });
  const bars = h("ul", { class: "bars" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const latency = h("p", { class: "latency" });
  const facts = h("dl", { class: "facts-list", hidden: true });
  const rows = makeRows(model.labels, bars);
  const unit = model.output.unit ? ` ${model.output.unit}` : "";

  const say = (big, small) => {
    headline.textContent = big;
    readout.textContent = big === "?" ? "" : big;
    detail.textContent = small;
    problem.hidden = true;
  };
  const readout = h("span", { class: "readout", "aria-hidden": "true" }); // beside the pad, where the panel is below it
  return {
    readout,
    element: h("section", { class: "panel result", "aria-label": "Prediction" }, headline, detail, bars, facts, problem, latency),
    show(prediction, ms) {
      if (model.task === "multilabel") {
        say(prediction.labels.join(", ") || "none", `of ${model.labels.length} labels`);
        fillRows(rows, { ...prediction, labels: model.labels });
        announce(prediction.labels.join(", ") || "no label");
      } else if (["values", "interval", "vector", "tensors"].includes(model.output.kind)) {
        const { big, small, rows: pairs } = describeOutput(model, prediction);
        say(big, small);
        facts.hidden = !pairs.length;
        facts.replaceChildren(...pairs.map(([name, text]) => h("div", null, h("dt", null, name), h("dd", null, text))));
        announce(`${big}; ${small}`);
      } else if (model.task === "regression") {
        say(`${show(prediction.prediction)}${unit}`, model.output.name);
        announce(`${model.output.name}: ${show(prediction.prediction)}${unit}`);
      } else {
        const own = prediction.probabilities[prediction.prediction];
        say(prediction.label, `with probability ${percent(own)}`);
        fillRows(rows, { ...prediction, labels: model.labels });
        announce(`${prediction.label}, ${percent(own)}`);
      }
      headline.classList.remove("faint");
      latency.textContent = `Answered in ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms, there and back.`;
    },
    problem(sentence) {
      problem.textContent = sentence;
      problem.hidden = false;
    },
    clear(text) {
      say("?", text);
      headline.classList.add("faint");
      for (const row of rows) setRow(row, row.index, row.label, 0, false);
      latency.textContent = "";
    },
  };
}

function makeRows(labels, list) {
  return labels.slice(0, MOST).map((label, index) => {
    const row = { index, label, name: h("span", { class: "bar-name" }), value: h("span", { class: "bar-value" }), bar: h("span", { class: "bar" }) };
    row.element = h("li", null, row.name, h("span", { class: "bar-track" }, row.bar), row.value);
    list.append(row.element);
    setRow(row, index, label, 0, false);
    return row;
  });
}

function setRow(row, index, label, value, chosen) {
  row.name.textContent = label;
  row.name.title = label;
  row.bar.style.transform = `scaleX(${value})`;
  row.value.textContent = percent(value);
  row.element.classList.toggle("chosen", chosen);
  row.element.dataset.label = label;
}

function fillRows(rows, { prediction, probabilities, labels }) {
  let order = probabilities.map((_, index) => index);
  if (probabilities.length > MOST) order = order.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, MOST);
  rows.forEach((row, place) => {
    const index = order[place];
    setRow(row, index, labels[index], probabilities[index], Array.isArray(prediction) ? prediction[index] === 1 : index === prediction);
  });
}
