// Trying an image model: draw, drop, paste or choose a picture, or take a sample.

import { post, Problem } from "./api.js";
import { buildCrop } from "./crop.js";
import { h, oneAtATime, onRecovered } from "./dom.js";
import { buildPad } from "./pad.js";
import { buildResult } from "./result.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/bmp"];
const PAUSE = 150; // ms between two predictions while a stroke is drawn: each is a request, and a line of the log
let kept = null; // what was on the pad last, for the next model of pictures of the same size

/** Return the panels to try `model` with; `isFirst`: begin with a sample. */
export function buildImagePlay(model, card, wire, compare, isFirst) {
  const { width, height, channels } = model.input.image;
  const size = `${width} ${height} ${channels}`;
  const result = buildResult(model);
  const saw = h("canvas", { class: "saw", width, height, role: "img", "aria-label": "What the model saw" });
  let sent = null; // a request's {body} or {file}; null: what is on the pad

  const update = oneAtATime(async () => {
    kept = { size, sent, state: pad.state };
    crop.element.hidden = !sent?.file;
    if (pad.empty && !sent) {
      paintSaw(saw, null, model.input);
      result.clear("Draw something on the pad.");
      compare.clear();
      return;
    }
    const isMoving = pad.busy;
    const request = sent ?? { file: await pad.encode(), isDrawn: true };
    const [content, type] = request.file ? [request.file, request.file.type] : [JSON.stringify(request.body), "application/json"];
    try {
      const [predicted, seen] = await Promise.all([
        post(`${model.path}:predict`, content, type), isMoving ? null : post(`${model.path}:preview`, content, type),
      ]);
      result.show(predicted.answer.predictions[0], predicted.ms);
      if (seen) paintSaw(saw, seen.answer.instances[0].flat(Infinity), model.input);
      if (!isMoving) compare.show(content, type);
      wire.exchange(request, predicted.text);
    } catch (problem) {
      result.clear("There is no prediction for this picture.");
      paintSaw(saw, null, model.input);
      result.problem(problem instanceof Problem ? problem.message : "This picture cannot be shown.");
    }
  }, () => (pad.busy ? PAUSE : 0));
  const pad = buildPad(width, height, () => {
    sent = null;
    update();
  });

  const take = async (file) => {
    if (!file) return;
    if (!TYPES.includes(file.type)) {
      result.problem(`${file.name} is not a PNG, JPEG, WebP or BMP file.`);
      return;
    }
    sent = { file };
    try {
      pad.lay(await createImageBitmap(file), "#000");
    } catch {
      pad.clear(); // the browser cannot show it; the service says why
      sent = { file };
    }
    update();
  };
  const crop = buildCrop(pad, take);
  const takeSample = (row) => {
    sent = { body: { instances: [row] } };
    pad.lay(paintRow(row, model.input), model.input.image.polarity === "light-on-dark" ? "#fff" : "#000", true);
    update();
  };
  const rows = card.golden?.inputs ?? [];
  const samples = rows.map((row, index) => buildSample(row, index, model.input, takeSample));
  const input = h("section", { class: "panel draw", "aria-label": "Picture" },
    pad.element,
    buildTools(pad, take, crop.element),
    samples.length ? h("div", { class: "samples", role: "group", "aria-label": "Samples" }, samples) : null,
    h("p", { class: "hint", id: "pad-help" }, "Draw with a mouse, pen or finger; or with the arrow keys, and the space bar to lift the pen. Or open, drop or paste a picture."),
  );
  listenToFiles(input, pad, take);
  if (kept?.size === size) {
    ({ sent } = kept);
    pad.restore(kept.state);
  } else if (isFirst && rows.length) takeSample(rows.at(-3) ?? rows[0]);
  update();
  onRecovered(input, update);
  const figure = h("figure", { class: "saw-figure" }, saw, h("figcaption", null, `What the model saw: ${width} × ${height}${channels > 1 ? " in colour" : ""}`));
  result.element.append(figure);
  return h("div", { class: "play" }, input, h("div", { class: "column" }, result.element, compare.element));
}

function buildTools(pad, take, more) {
  const chooser = h("input", {
    type: "file", id: "file-input", class: "unseen", accept: TYPES.join(","),
    onchange: (event) => {
      take(event.target.files[0]);
      event.target.value = "";
    },
  });
  return h("div", { class: "tools" },
    h("button", { type: "button", onclick: () => pad.clear() }, "Clear"),
    h("button", { type: "button", onclick: () => pad.undo() }, "Undo"),
    chooser, h("label", { class: "button", for: "file-input" }, "Open a file"),
    more,
  );
}

function listenToFiles(panel, pad, take) {
  panel.addEventListener("dragover", (event) => {
    event.preventDefault();
    panel.classList.add("dropping");
  });
  panel.addEventListener("dragleave", () => panel.classList.remove("dropping"));
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    panel.classList.remove("dropping");
    take(event.dataTransfer.files[0]);
  });
  const paste = (event) => {
    if (!panel.isConnected) document.removeEventListener("paste", paste);
    else if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
  };
  document.addEventListener("paste", paste);
  document.addEventListener("keydown", function undo(event) {
    if (!panel.isConnected) document.removeEventListener("keydown", undo);
    else if ((event.ctrlKey || event.metaKey) && event.key === "z" && pad.drawn) {
      event.preventDefault();
      pad.undo();
    }
  });
}

function buildSample(row, index, input, take) {
  const picture = paintRow(row, input);
  picture.setAttribute("aria-hidden", "true");
  return h("button", { type: "button", class: "sample", "aria-label": `Sample ${index + 1}`, onclick: () => take(row) }, picture);
}

function paintRow(row, input) {
  const canvas = h("canvas", { width: input.image.width, height: input.image.height });
  paintSaw(canvas, row, input);
  return canvas;
}

/** Paint numbers in the order of the input's shape, or blank paper for none. */
function paintSaw(canvas, row, { image, shape }) {
  const { width, height, channels, polarity } = image;
  const first = shape.length === 3 && shape[0] === channels && shape[1] === height && shape[2] === width;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let place = 0; place < width * height; place += 1) {
    for (let channel = 0; channel < 3; channel += 1) {
      const own = channels === 1 ? 0 : channel;
      const value = row ? row[first ? own * width * height + place : place * channels + own] : Number(polarity === "dark-on-light");
      pixels.data[4 * place + channel] = Math.round(255 * value);
    }
    pixels.data[4 * place + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}
