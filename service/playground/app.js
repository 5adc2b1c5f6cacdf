// The page: which model is shown, and everything about it. It knows no model by name.

import { address, askKey, get } from "./api.js";
import { buildCard } from "./card.js";
import { buildColumnsPlay } from "./columns.js";
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
let models = [];

async function start() {
  document.getElementById("key-button").addEventListener("click", () => askKey("Send another key from now on."));
  window.addEventListener("hashchange", () => showModel());
  try {
    ({ models } = await get("v1/models"));
  } catch (problem) {
    showProblem(problem);
    return;
  }
  if (!models.length) {
    main.replaceChildren(h("p", { class: "empty" }, "There is no model in the service's folder yet."));
    return;
  }
  await showModel();
}

/** Return what the address names: `#name` or `#name/version`; else a model to begin with. */
function readHash() {
  const [name, version] = decodeURIComponent(location.hash.slice(1)).split("/");
  const named = models.find((model) => model.name === name);
  const first = models.find((model) => model.ready && model.input?.kind === "image") ?? models.find((model) => model.ready);
  const model = named ?? first ?? models[0];
  return { model, version: named && model.versions.includes(Number(version)) ? Number(version) : null };
}

function showNav(chosen) {
  const links = models.map((model) =>
    h("li", null,
      h("a", { href: `#${model.name}`, "aria-current": model === chosen ? "page" : false },
        h("span", { class: "nav-title" }, model.title || model.name),
        h("span", { class: "nav-name" }, model.ready ? model.name : `${model.name}: not ready`)),
    ),
  );
  nav.replaceChildren(h("ul", null, links));
  const here = nav.querySelector("[aria-current]");
  nav.scrollLeft = Math.max(0, here.offsetLeft - 16);
}

async function showModel() {
  if (location.hash === "#main") return;
  const { model, version } = readHash();
  showNav(model);
  document.title = `${model.title || model.name} · Playground`;
  if (!model.ready) {
    showRefused(model);
    return;
  }
  try {
    const path = version ? `v1/models/${model.name}/versions/${version}` : `v1/models/${model.name}`;
    const [described, card] = await Promise.all([get(path), get(`${path}/card`)]);
    if (readHash().model === model) showPlay({ ...described, path, named: version !== null }, card);
  } catch (problem) {
    showProblem(problem);
  }
}

function showPlay(model, card) {
  if (model.task === "tensors") {
    main.replaceChildren(h("div", { class: "work" }, buildHeading(model), buildTensors(model)), buildCard(model, card));
    return;
  }
  const wire = buildWire(model);
  const build = { image: buildImagePlay, tabular: buildTabularPlay, columns: buildColumnsPlay }[model.input.kind];
  main.replaceChildren(
    h("div", { class: "work" }, buildHeading(model), build(model, card, wire), wire.element),
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
  get("openapi.json").then(({ paths }) => {
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
  main.replaceChildren(
    h("div", { class: "work" },
      h("p", { class: "problem", role: "alert" }, problem.message),
      h("button", { type: "button", class: "primary", onclick: () => location.reload() }, "Try again")),
  );
}

start();
