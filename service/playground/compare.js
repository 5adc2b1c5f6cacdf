// One input, and what every other model that takes it answers.

import { post } from "./api.js";
import { h } from "./dom.js";
import { describeOutput } from "./outputs.js";

/** Return what two models must have in common to take the same input. */
function describeInput({ input }) {
  if (!input) return null;
  const { width, height, channels } = input.image ?? {};
  const names = (input.features ?? input.columns ?? []).map(({ name }) => name);
  return JSON.stringify([input.kind, width, height, channels, channels > 1 ? input.shape : null, names]);
}

/** Return the panel, or nothing where no other model takes the same input, with `show(content, type)` and `clear()`. */
export function buildCompare(model, models) {
  const others = models.filter((other) => other.ready && !other.cold && other.name !== model.name && describeInput(other) === describeInput(model));
  if (!others.length || !model.input) return { element: null, show() {}, clear() {} };
  const rows = others.map((other) => {
    const [big, small] = [h("td", { class: "compare-big" }), h("td", null)];
    const link = h("a", { href: `#${encodeURIComponent(other.name)}` }, other.title || other.name);
    return { other, big, small, element: h("tr", null, h("th", { scope: "row" }, link, h("span", { class: "nav-name" }, other.name)), big, small) };
  });
  let asked = null; // [content, type] that the rows are to answer
  let running = false;

  const set = (row, big, small) => {
    row.big.textContent = big;
    row.small.textContent = small;
  };
  const ask = async ([content, type]) => {
    await Promise.all(rows.map(async (row) => {
      try {
        const { answer } = await post(`v1/models/${encodeURIComponent(row.other.name)}:predict`, content, type);
        const { big, small } = describeOutput(row.other, answer.predictions[0]);
        set(row, big, small.replace("with probability ", ""));
      } catch (problem) {
        set(row, "", problem.message);
      }
    }));
  };
  const element = h("details", { class: "panel compare", open: true }, h("summary", null, "The same input, other models"),
    h("table", null, h("caption", { class: "unseen" }, "Answers of other models to the same input"), h("tbody", null, rows.map((row) => row.element))));
  return {
    element,
    async show(content, type) {
      asked = [content, type];
      if (running || !element.open) return;
      running = true;
      await new Promise((resolve) => setTimeout(resolve, 250)); // until a slider rests
      for (let last = null; last !== asked && asked;) {
        last = asked;
        await ask(last);
      }
      running = false;
    },
    clear() {
      asked = null;
      for (const row of rows) set(row, "", "");
    },
  };
}
