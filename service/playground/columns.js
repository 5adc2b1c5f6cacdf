// Trying a model with typed columns: a field for every column, by its type.

import { post } from "./api.js";
import { h, oneAtATime, onRecovered, show } from "./dom.js";
import { buildResult } from "./result.js";
import { buildThreshold } from "./tabular.js";

/** Return the panels to try `model` with. */
export function buildColumnsPlay(model, card, wire, compare) {
  const result = buildResult(model);
  const { columns } = model.input;
  const samples = card.golden?.inputs ?? [];
  const state = { values: { ...Object.fromEntries(columns.map((column) => [column.name, chooseStart(column)])), ...samples[0] }, threshold: model.threshold };

  const update = oneAtATime(async () => {
    const body = { instances: [state.values] };
    if (model.task === "binary" && state.threshold !== model.threshold) body.parameters = { threshold: state.threshold };
    try {
      const { answer, text, ms } = await post(`${model.path}:predict`, JSON.stringify(body));
      result.show(answer.predictions[0], ms);
      wire.exchange({ body }, text);
      compare.show(JSON.stringify({ instances: body.instances }));
    } catch (problem) {
      result.problem(problem.message);
    }
  });
  const fields = columns.map((column, index) =>
    buildField(column, `column-${index}`, state.values[column.name], (value) => {
      state.values = { ...state.values, [column.name]: value };
      update();
    }),
  );
  const choose = (values) => {
    state.values = { ...values };
    fields.forEach((field, index) => field.set(values[columns[index].name]));
    update();
  };
  const chips = samples.slice(0, 6).map((values) => {
    const shown = columns.map(({ name }) => showValue(values[name]));
    return h("button", {
      type: "button", class: "chip", "aria-label": `Sample: ${columns.map(({ name }, index) => `${name} ${shown[index]}`).join(", ")}`,
      onclick: () => choose(values),
    }, shown.slice(0, 4).join(", ") + (shown.length > 4 ? ", …" : ""));
  });
  update();
  onRecovered(result.element, update);
  return h("div", { class: "play" },
    h("section", { class: "panel features", "aria-label": "Input" },
      fields.map((field) => field.element),
      model.task === "binary" ? buildThreshold(model, state, update) : null,
      chips.length ? h("div", { class: "samples", role: "group", "aria-label": "Samples" }, chips) : null),
    h("div", { class: "column" }, result.element, compare.element));
}

function showValue(value) {
  if (value === null) return "none";
  return typeof value === "number" ? show(value) : String(value).slice(0, 24);
}

/** Return a value to begin with: the default, null, or something plain. */
function chooseStart({ type, values, minimum, maximum, nullable, default: own }) {
  if (own !== undefined) return own;
  if (nullable) return null;
  const low = minimum ?? (maximum === undefined ? 0 : maximum - 1);
  const middle = (low + (maximum ?? low + 1)) / 2;
  return { number: middle, integer: Math.round(middle), boolean: false, category: values?.[0], text: "text", datetime: "2024-01-31T12:00:00" }[type];
}

/** Return one column's field with `element` and `set(value)`; `onchange` is given each new value. */
function buildField(column, id, value, onchange) {
  const build = { number: buildNumber, integer: buildNumber, boolean: buildSwitch, category: buildSelect, text: buildText, datetime: buildDate }[column.type];
  const { entry, more, read, write } = build(column, id, () => change());
  const none = column.nullable ? h("input", { type: "checkbox", id: `${id}-none`, onchange: () => change() }) : null;
  const change = (given) => {
    const isNull = none?.checked ?? false;
    for (const input of [entry, ...more]) input.disabled = isNull;
    const found = isNull ? null : read();
    if (given === undefined && found !== undefined) onchange(found);
  };
  const set = (given) => {
    if (none) none.checked = given === null;
    if (given !== null && given !== undefined) write(given);
    change(given);
  };
  if (value === null) write(chooseStart({ ...column, nullable: false, default: undefined }));
  set(value);
  const hint = [column.description, column.minimum !== undefined && column.maximum !== undefined ? `${show(column.minimum)} to ${show(column.maximum)}${column.unit ? ` ${column.unit}` : ""}` : null];
  const about = hint.filter(Boolean).join("; ");
  return {
    set,
    element: h("div", { class: "feature" },
      h("label", { for: id }, column.name),
      h("span", { class: "entry" }, entry, column.unit ? h("span", { class: "unit" }, column.unit) : null,
        none ? h("label", { class: "none", for: `${id}-none` }, none, "none") : null),
      more, about ? h("p", { class: "hint" }, about) : null),
  };
}

function buildNumber(column, id, change) {
  const step = column.type === "integer" ? 1 : "any";
  const entry = h("input", { type: "number", id, step, inputmode: column.type === "integer" ? "numeric" : "decimal", oninput: () => { if (slider) slider.value = entry.value; change(); } });
  const hasRange = column.minimum !== undefined && column.maximum !== undefined;
  const fine = hasRange ? 10 ** Math.floor(Math.log10((column.maximum - column.minimum) / 100)) : 1;
  const slider = hasRange
    ? h("input", { type: "range", min: column.minimum, max: column.maximum, step: column.type === "integer" ? 1 : fine, "aria-label": `${column.name}, slider`, oninput: () => { entry.value = slider.value; change(); } })
    : null;
  return {
    entry, more: slider ? [slider] : [],
    read: () => (Number.isFinite(entry.valueAsNumber) ? entry.valueAsNumber : undefined),
    write: (value) => {
      entry.value = Number(Number(value).toPrecision(12));
      if (slider) slider.value = value;
    },
  };
}

function buildSwitch(column, id, change) {
  const entry = h("input", { type: "checkbox", role: "switch", id, onchange: () => change() });
  return { entry, more: [], read: () => entry.checked, write: (value) => { entry.checked = value; } };
}

function buildSelect(column, id, change) {
  const entry = h("select", { id, onchange: () => change() }, column.values.map((value) => h("option", null, String(value))));
  return { entry, more: [], read: () => column.values[entry.selectedIndex], write: (value) => { entry.selectedIndex = column.values.indexOf(value); } };
}

function buildText(column, id, change) {
  const entry = h("textarea", { id, rows: 2, oninput: () => change() });
  return { entry, more: [], read: () => entry.value, write: (value) => { entry.value = value; } };
}

/** A date and time in UTC; what a sample has beyond whole seconds is lost once it is edited. */
function buildDate(column, id, change) {
  const entry = h("input", { type: "datetime-local", id, step: 1, oninput: () => change() });
  return {
    entry, more: [],
    read: () => entry.value || undefined,
    write: (value) => {
      const moment = new Date(/[zZ]|[+-]\d\d:?\d\d$/.test(value) || !value.includes("T") ? value : `${value}Z`);
      entry.value = Number.isNaN(moment.getTime()) ? "" : moment.toISOString().slice(0, 19);
    },
  };
}
