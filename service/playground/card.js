// The model card: what the model is, how good it is, how it was made, and where it runs.

import { getPicture } from "./api.js";
import { h, show } from "./dom.js";

const MEANINGS = {
  accuracy: "share of test rows with the right label",
  loss: "mean cross-entropy; lower is better",
  ece: "expected calibration error: how far probabilities are from how often they are right",
  auc: "chance that a positive row is ranked above a negative one",
  brier: "mean squared error of the probability",
  mse: "mean squared error",
  rmse: "root of the mean squared error, in the output's unit",
  mae: "mean absolute error, in the output's unit",
  r2: "share of the variance that is explained",
  temperature: "divides the logits, so that probabilities are calibrated",
  int8_accuracy: "accuracy of the quantized file",
  accuracy_low: "95 % interval over seeds, lower end",
  accuracy_high: "95 % interval over seeds, upper end",
};

/** Return the card of a model's version. */
export function buildCard(model, card) {
  return h("aside", { class: "card", "aria-label": "Model card" },
    h("section", { class: "panel" }, h("h2", null, "Model card"), buildFacts(model)),
    buildMetrics(model),
    buildTraining(card.training),
    buildPlots(model, card.plots),
    buildDigests(model),
  );
}

function list(pairs) {
  return h("dl", null, pairs.filter(([, value]) => value).map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}

function buildFacts(model) {
  const { input, output } = model;
  const place = [["Runs on", `${model.device}, ${model.backend}`], ["Provider", model.provider]];
  const version = model.versions.length > 1 ? `${model.version} of ${model.versions.join(", ")}` : String(model.version);
  const name = [["Name", model.name], ["Version", version], ["Task", model.task]];
  if (!input) return list([...name, ...place]);
  const picture = input.kind === "image" && `picture, ${input.image.width} × ${input.image.height}${input.image.channels === 3 ? ", colour" : ""}`;
  const labels = model.labels.length > 12 ? `${model.labels.length} labels` : model.labels.join(", ");
  return list([
    ...name,
    ["Input", picture || (input.features ?? input.columns).map(({ name, unit }) => (unit ? `${name} (${unit})` : name)).join(", ")],
    ["Output", model.labels.length ? labels : nameOutputs(output)],
    ["Threshold", model.threshold === null ? "" : String(model.threshold)],
    ...place,
  ]);
}

function nameOutputs(output) {
  const named = [...(output.values ?? []), ...(output.outputs ?? [])];
  return (named.length ? named : [output]).map(({ name, unit }) => (unit ? `${name} in ${unit}` : name)).join(", ");
}

function buildMetrics(model) {
  const metrics = Object.entries(model.metrics);
  if (!metrics.length) return null;
  const row = ([name, value]) => h("tr", null,
    h("th", { scope: "row" }, name.replaceAll("_", " "), MEANINGS[name] ? h("span", { class: "hint" }, MEANINGS[name]) : null),
    h("td", null, show(value)));
  return h("section", { class: "panel" }, h("h2", null, "Metrics"),
    h("table", null, h("caption", { class: "unseen" }, "Figures on the test data"), h("tbody", null, metrics.map(row))));
}

function buildTraining(training) {
  if (!training) return null;
  const libraries = Object.entries(training.libraries).map(([name, version]) => `${name} ${version}`).join(", ");
  const parity = Object.entries(training.parity_difference).map(([name, value]) => `${name} ${value ? value.toExponential(1) : "0"}`).join(", ");
  return h("section", { class: "panel" }, h("h2", null, "Training"),
    list([
      ["Recipe", training.recipe],
      ["Epochs", String(training.epochs)],
      ["Seed", String(training.seed)],
      ["Took", training.seconds ? `${show(training.seconds)} s` : ""],
      ["Finished", training.finished_at ? training.finished_at.slice(0, 10) : ""],
      ["Export error", parity],
    ]),
    h("details", null, h("summary", null, "Libraries and data"),
      h("p", { class: "small" }, libraries),
      list(Object.entries(training.data).map(([name, digest]) => [`${name} data`, h("code", null, digest)]))));
}

function buildPlots(model, plots) {
  if (!plots.length) return null;
  const figures = plots.map((file) => {
    const name = file.replace(/\.png$/, "").replaceAll(/[-_]/g, " ");
    const picture = h("img", { alt: `Training plot: ${name}` });
    const link = h("a", { target: "_blank", "aria-label": `Training plot: ${name}, in full` }, picture);
    getPicture(`v1/models/${model.name}/versions/${model.version}/plots/${encodeURIComponent(file)}`).then(
      (address) => {
        picture.src = link.href = address;
      },
      () => figure.remove(),
    );
    const figure = h("figure", null, link, h("figcaption", null, name));
    return figure;
  });
  return h("section", { class: "panel" }, h("h2", null, "Training plots"), h("div", { class: "plots" }, figures));
}

function buildDigests(model) {
  const rows = Object.entries(model.artifacts).map(([name, artifact]) =>
    [name, [`${artifact.file}, ${(artifact.bytes / 1000).toFixed(1)} kB`, h("code", null, artifact.sha256)]]);
  return h("section", { class: "panel" }, h("h2", null, "Files"),
    h("details", null, h("summary", null, "Digests, SHA-256"), list(rows)));
}
