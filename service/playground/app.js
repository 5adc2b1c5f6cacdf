// The page: which model is shown, and everything about it. It knows no model by name.

import { address, askKey, get, isAsking } from "./api.js";
import { buildCard } from "./card.js";
import { buildColumnsPlay } from "./columns.js";
import { buildCompare } from "./compare.js";
import { h } from "./dom.js";
import { buildImagePlay } from "./image.js";
import { buildTabularPlay } from "./tabular.js";
import { buildWire, writeCurl } from "./wire.js";

const nav = document.getElementById("models");
const main = document.getElementById("main");
const TASKS = {
  regression: "predicts numbers", binary: "tells two classes apart", multiclass: "tells classes apart", multilabel: "says which labels apply",
  embedding: "turns its input into a vector", outputs: "gives several outputs", tensors: "tensors in, tensors out",
};
const FILTER_FROM = 9; // models
const WATCH_MS = 3000;
let models = [];
let revision = null; // changes with what the service serves
let shown = null; // the description of the model on the page
let turn = 0; // of showing a model; an older one that ends later shows nothing

async function start() {
  document.getElementById("key-button").addEventListener("click", () => askKey("Send another key from now on.").then(refresh, () => {}));
  window.addEventListener("hashchange", () => showModel());
  document.addEventListener("recovered", refresh);
  setInterval(watch, WATCH_MS);
  await refresh();
}

/** Read what is served; show the model of the address unless it is on the page as it is. */
async function refresh() {
  try {
    ({ revision } = await get("playground/revision"));
    ({ models } = await get("v1/models"));
  } catch (problem) {
    if (!shown) showProblem(problem);
    return;
  }
  const { model, version } = readHash();
  if (shown && model?.name === shown.name && (version !== null || model.version === shown.version)) showNav(model);
  else await showModel();
}

async function watch() {
  if (document.hidden || isAsking()) return;
  try {
    const found = await get("playground/revision");
    if (revision !== null && found.revision !== revision) await refresh();
  } catch {
    // the banner tells
  }
}

/** Return what the address names: `#name` or `#name/version`; else a model to begin with. No model: there is none. */
function readHash() {
  let text = location.hash.slice(1);
  try {
    text = decodeURIComponent(text);
  } catch {
    // a lone %
  }
  const [name, version] = text.split("/");
  const model = text ? models.find((each) => each.name === name) : chooseFirst();
  return { text, model, version: version && Number(version) !== model?.version ? Number(version) : null };
}

/** Return the most accurate model of pictures, else the most accurate, else any. */
function chooseFirst() {
  return [...models].sort((a, b) => rank(b) - rank(a))[0];
}

function rank(model) {
  return 4 * Boolean(model.ready) + 2 * (model.input?.kind === "image") + (model.metrics?.accuracy ?? 0);
}

function showNav(chosen) {
  const links = models.map((model) =>
    h("li", { "data-text": `${model.title ?? ""} ${model.name}`.toLowerCase() },
      h("a", { href: `#${encodeURIComponent(model.name)}`, "aria-current": model.name === chosen?.name ? "page" : false },
        h("span", { class: "nav-title" }, model.title || model.name),
        h("span", { class: "nav-name" }, model.ready ? model.name : `${model.name}: not ready`)),
    ),
  );
  const text = nav.querySelector("input")?.value ?? "";
  const list = h("ul", null, links);
  const search = h("input", { type: "search", "aria-label": "Filter models", placeholder: `Filter ${models.length} models`, value: text, oninput: () => filter(list, search.value) });
  nav.replaceChildren(...(models.length >= FILTER_FROM ? [search] : []), list);
  filter(list, text);
  const here = nav.querySelector("[aria-current]");
  if (!here) return;
  list.scrollLeft = Math.max(0, here.offsetLeft - 16);
  list.scrollTop = Math.max(0, here.offsetTop - list.offsetTop - 60);
}

function filter(list, text) {
  for (const item of list.children) item.hidden = !item.dataset.text.includes(text.trim().toLowerCase());
}

async function showModel() {
  if (location.hash === "#main") return;
  turn += 1;
  const own = turn;
  const { text, model, version } = readHash();
  showNav(model);
  shown = model ?? null;
  document.title = `${model ? model.title || model.name : "Models"} · Playground`;
  if (!model) {
    const sentence = text ? `There is no model “${text.split("/")[0]}”.` : "There is no model in the service's folder yet.";
    main.replaceChildren(h("p", { class: text ? "problem" : "empty", role: text ? "alert" : false }, sentence));
    return;
  }
  if (!model.ready) {
    showRefused(model);
    return;
  }
  try {
    const path = `v1/models/${encodeURIComponent(model.name)}${version === null ? "" : `/versions/${version}`}`;
    const [described, card] = await Promise.all([get(path), get(`${path}/card`)]);
    if (own === turn) showPlay({ ...described, path, named: version !== null }, card, text === "");
  } catch (problem) {
    if (own === turn) showProblem(problem);
  }
}

function showPlay(model, card, isFirst) {
  if (model.task === "tensors") {
    main.replaceChildren(h("div", { class: "work" }, buildHeading(model), buildTensors(model)), buildCard(model, card));
    return;
  }
  const wire = buildWire(model);
  const compare = buildCompare(model, models);
  const build = { image: buildImagePlay, tabular: buildTabularPlay, columns: buildColumnsPlay }[model.input.kind];
  main.replaceChildren(
    h("div", { class: "work" }, buildHeading(model), build(model, card, wire, compare, isFirst), wire.element),
    buildCard(model, card),
  );
}

function buildHeading(model) {
  const choose = (event) => {
    location.hash = event.target.value ? `#${model.name}/${event.target.value}` : `#${model.name}`;
  };
  const options = model.versions.toReversed().map((number, index) =>
    h("option", { value: index ? number : "", selected: number === model.version }, `version ${number}`),
  );
  const versions = model.versions.length > 1
    ? h("label", { class: "version" }, h("span", { class: "unseen" }, "Version"), h("select", { onchange: choose }, options))
    : h("span", null, `version ${model.version}`);
  return h("header", { class: "heading" },
    h("h1", null, model.title || model.name),
    h("p", { class: "facts" }, h("span", null, TASKS[model.task]), versions, h("span", null, `on ${model.device}`)),
    model.description ? h("p", { class: "about" }, model.description) : null,
  );
}

/** Return what is known of a model that says only which tensors go in and come out, with a request to begin with. */
function buildTensors(model) {
  const row = (kind) => (spec) =>
    h("tr", null, h("th", { scope: "row" }, `${kind} ${spec.name}`), h("td", null, `${spec.datatype} [${spec.shape.join(", ")}]`));
  const path = `${model.path.replace("v1", "v2")}/infer`;
  const request = h("section", { class: "panel wire", "aria-label": "Request" }, h("pre", null, h("code", null, address(path))));
  get(`openapi.json?model=${encodeURIComponent(model.name)}`).then(({ paths }) => {
    const described = paths[`/${path}`] ?? paths[`/v2/models/${model.name}/versions/{version}/infer`];
    const body = described?.post.requestBody.content["application/json"]?.example;
    if (body) request.replaceChildren(h("pre", { tabindex: "0" }, h("code", null, writeCurl(address(path), { body }))));
  }, () => {}); // the address is there
  const tensors = h("section", { class: "panel" }, h("h2", null, "Tensors"),
    h("table", null, h("caption", { class: "unseen" }, "Tensors in and out"),
      h("tbody", null, model.inputs.map(row("in")), model.outputs.map(row("out")))),
    h("p", { class: "hint" }, "Its manifest does not say what the numbers mean, so there is nothing to draw or slide. Ask it so:"));
  return [tensors, request];
}

function showRefused(model) {
  const reasons = Object.entries(model.refused).map(([version, why]) => h("li", null, `Version ${version}: ${why}.`));
  main.replaceChildren(
    h("div", { class: "work" },
      h("h1", null, model.title || model.name),
      h("p", { class: "problem", role: "alert" }, "No version of this model serves."),
      h("ul", null, reasons)),
  );
}

function showProblem(problem) {
  shown = null;
  main.replaceChildren(
    h("div", { class: "work" },
      h("p", { class: "problem", role: "alert" }, problem.message),
      h("button", { type: "button", class: "primary", onclick: () => refresh() }, "Try again")),
  );
}

start();
