// A pad to draw on: mouse, pen, finger, or the arrow keys; dark ink on white paper, whatever the page's colours.

import { h } from "./dom.js";

const LONG_SIDE = 280; // pixels
const PEN = 0.075; // of the pad's side: about two pixels of MNIST's 28
const STEP = 0.035; // of the pad's side, for an arrow key

/** Return a pad for pictures of width × height; `onchange` is called after every change. */
export function buildPad(width, height, onchange) {
  const scale = LONG_SIDE / Math.max(width, height);
  const canvas = h("canvas", {
    width: Math.round(width * scale), height: Math.round(height * scale), tabindex: "0", role: "application",
    "aria-label": "Drawing pad", "aria-describedby": "pad-help", class: "pad",
  });
  const pen = h("span", { class: "pad-pen", hidden: true });
  const context = canvas.getContext("2d");
  const line = PEN * Math.min(canvas.width, canvas.height);
  let strokes = []; // each a list of [x, y]
  let under = null; // a picture below the strokes
  let drawing = null;
  let covered = false; // whether the picture below is a sample, which the first stroke replaces

  function paint() {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    canvas.classList.toggle("photo", under !== null);
    if (under) paintUnder();
    for (const stroke of strokes) paintStroke(stroke);
  }

  /** Return the scale of the picture below, and where its left upper corner is. */
  function fitUnder() {
    const fit = Math.min(canvas.width / under.width, canvas.height / under.height);
    return [fit, (canvas.width - under.width * fit) / 2, (canvas.height - under.height * fit) / 2];
  }

  function paintUnder() {
    const [fit, left, top] = fitUnder();
    context.imageSmoothingEnabled = fit < 4;
    context.drawImage(under, left, top, under.width * fit, under.height * fit);
  }

  function paintStroke(stroke) {
    context.lineWidth = line;
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = under?.ink ?? "#000";
    context.beginPath();
    context.moveTo(...stroke[0]);
    for (const point of stroke) context.lineTo(...point);
    context.stroke();
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  }

  function begin(point) {
    if (covered) under = null;
    covered = false;
    drawing = [point];
    strokes.push(drawing);
    paint();
    onchange();
  }

  function extend(points) {
    drawing.push(...points);
    paint(); // all of it: pieces painted over pieces would have harder edges
    onchange();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pen.hidden = true;
    canvas.setPointerCapture(event.pointerId);
    begin(place(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drawing || !canvas.hasPointerCapture(event.pointerId)) return;
    const events = event.getCoalescedEvents?.() ?? [];
    extend((events.length ? events : [event]).map(place));
  });
  const lift = () => {
    if (!drawing) return;
    drawing = null;
    onchange();
  };
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, lift);
  listenToKeys(canvas, pen, begin, extend, () => drawing, lift);

  paint();
  return {
    canvas,
    element: h("div", { class: "pad-frame" }, canvas, pen),
    get empty() {
      return !strokes.length && !under;
    },
    get drawn() {
      return strokes.length > 0;
    },
    /** Whether a stroke is being drawn. */
    get busy() {
      return drawing !== null;
    },
    /** What is on the pad, for `restore` of another pad. */
    get state() {
      return { strokes, under, covered };
    },
    restore(state) {
      ({ strokes, under, covered } = state);
      paint();
    },
    clear() {
      strokes = [];
      under = drawing = null;
      paint();
      onchange();
    },
    undo() {
      if (strokes.length) strokes.pop();
      else under = null;
      drawing = null;
      paint();
      onchange();
    },
    /** Put a picture under an empty pad; `ink` is the colour that is drawn on it with. A sample is not drawn on. */
    lay(picture, ink, isSample = false) {
      strokes = [];
      drawing = null;
      under = picture;
      under.ink = ink;
      covered = isSample;
      paint();
    },
    /** Return the pad as a PNG file. */
    encode: () => encode(canvas, "drawing.png"),
    /** Return a part of the picture below, at its own resolution, as a PNG file; [start, size] across and down, of 1. */
    cut([[x, wide], [y, tall]]) {
      const [fit, left, top] = fitUnder();
      const part = h("canvas", { width: Math.max(1, (wide * canvas.width) / fit), height: Math.max(1, (tall * canvas.height) / fit) });
      const paper = part.getContext("2d");
      paper.fillStyle = "#fff";
      paper.fillRect(0, 0, part.width, part.height);
      paper.drawImage(under, (left - x * canvas.width) / fit, (top - y * canvas.height) / fit);
      return encode(part, "crop.png");
    },
  };
}

async function encode(canvas, name) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], name, { type: "image/png" });
}

/** Arrow keys move a pen; the space bar puts it down and lifts it. */
function listenToKeys(canvas, pen, begin, extend, isDown, lift) {
  let at = [canvas.width / 2, canvas.height / 4];
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const show = () => {
    pen.hidden = false;
    pen.style.left = `${(100 * at[0]) / canvas.width}%`;
    pen.style.top = `${(100 * at[1]) / canvas.height}%`;
    pen.classList.toggle("down", Boolean(isDown()));
  };
  canvas.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move && event.key !== " ") return;
    event.preventDefault();
    if (move) {
      const limit = [canvas.width, canvas.height];
      at = at.map((value, axis) => Math.min(Math.max(value + move[axis] * STEP * limit[axis], 0), limit[axis]));
      if (isDown()) extend([at]);
    } else if (isDown()) lift();
    else begin(at);
    show();
  });
  canvas.addEventListener("blur", () => {
    pen.hidden = true;
    lift();
  });
}
