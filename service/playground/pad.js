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

  function paint() {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    canvas.classList.toggle("photo", under !== null);
    if (under) paintUnder();
    for (const stroke of strokes) paintStroke(stroke);
  }

  function paintUnder() {
    const fit = Math.min(canvas.width / under.width, canvas.height / under.height);
    const [wide, tall] = [under.width * fit, under.height * fit];
    context.imageSmoothingEnabled = fit < 4;
    context.drawImage(under, (canvas.width - wide) / 2, (canvas.height - tall) / 2, wide, tall);
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
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (drawing = null));
  listenToKeys(canvas, pen, begin, extend, () => drawing, () => (drawing = null));

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
    /** Put a picture under an empty pad; `ink` is the colour that is drawn on it with. */
    lay(picture, ink) {
      strokes = [];
      drawing = null;
      under = picture;
      under.ink = ink;
      paint();
    },
    /** Return the pad as base64 of a PNG file. */
    encode() {
      return canvas.toDataURL("image/png").split(",")[1];
    },
  };
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
