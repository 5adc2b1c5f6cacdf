// The answer in words and bars.

import { announce, h, percent } from "./dom.js";
import { describeOutput } from "./outputs.js";

const LONG = 8; // characters of a headline that is set smaller
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
  const peek = buildPeek(headline);
  const element = h("section", { class: "panel result", "aria-label": "Prediction" }, problem, headline, detail, bars, facts, latency, peek.element);

  const say = (big, small) => {
    headline.textContent = big;
    headline.classList.toggle("long", big.length > LONG);
    detail.textContent = small;
    problem.hidden = true;
    element.classList.remove("stale");
    peek.say(big, small);
  };
  return {
    element,
    show(prediction, ms) {
      const { big, small, rows: pairs } = describeOutput(model, prediction);
      say(big, small);
      if (prediction.probabilities) fillRows(rows, { ...prediction, labels: model.labels });
      facts.hidden = !pairs.length;
      facts.replaceChildren(...pairs.map(([name, text]) => h("div", null, h("dt", null, name), h("dd", null, text))));
      announce(`${big}, ${small}`);
      headline.classList.remove("faint");
      latency.textContent = `Answered in ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms, there and back.`;
    },
    problem(sentence) {
      problem.textContent = sentence;
      problem.hidden = false;
      latency.textContent = "";
      element.classList.add("stale"); // the answer, if any, is not to what was asked last
      peek.say("", sentence);
    },
    clear(text) {
      say("?", text);
      headline.classList.add("faint");
      for (const row of rows) setRow(row, row.index, row.label, 0, false);
      latency.textContent = "";
    },
  };
}

/** Return a bar at the window's bottom that repeats the answer while `headline` is out of view. */
function buildPeek(headline) {
  const [big, small] = [h("strong", null), h("span", null)];
  const element = h("div", { class: "peek", "aria-hidden": "true", hidden: true }, big, small);
  new IntersectionObserver(([{ isIntersecting }]) => (element.hidden = isIntersecting)).observe(headline);
  return {
    element,
    say(text, more) {
      big.textContent = text;
      small.textContent = more;
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
