// The page of the API's description: Swagger UI, which reads it and sends examples with the tab's key where one is needed.

/* global SwaggerUIBundle */
import { address, get, readKey } from "./api.js";
import { h } from "./dom.js";

const MOST = 20; // models that are described at once; of more, the user picks one
const place = document.getElementById("ui");

async function show(path) {
  const spec = await get(path); // asks for the key until one is right
  spec.servers = [{ url: address("").replace(/\/$/, "") }];
  const ui = SwaggerUIBundle({
    spec, domNode: place, deepLinking: true, docExpansion: "list", filter: true,
    onComplete: () => readKey() && ui.preauthorizeApiKey("key", readKey()),
  });
}

const showModel = (name) => show(`openapi.json?model=${encodeURIComponent(name)}`);

function buildPicker(models) {
  const names = models.filter(({ ready }) => ready).map(({ name }) => name);
  const input = h("input", { id: "picker", list: "names", value: names[0], onchange: () => names.includes(input.value) && showModel(input.value).catch(report) });
  return h("p", { class: "picker" }, h("label", { for: "picker" }, `Model (of ${models.length})`), input,
    h("datalist", { id: "names" }, names.map((name) => h("option", { value: name }))));
}

function report(problem) {
  place.textContent = problem.message;
  place.className = "problem";
}

try {
  const { models } = await get("v1/models");
  const first = models.find(({ ready }) => ready);
  if (models.length > MOST && first) {
    place.before(buildPicker(models));
    await showModel(first.name);
  } else await show("openapi.json");
} catch (problem) {
  report(problem);
}
