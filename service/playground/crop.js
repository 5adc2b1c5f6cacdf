// Cutting a part out of a picture that lies on the pad, such as one digit of a photographed page.

import { h } from "./dom.js";

const LEAST = 0.03; // of the picture's side; a smaller box is a slip of the hand

/** Return the button that lets the user drag a box on the pad; `take` is given the part as a file. */
export function buildCrop(pad, take) {
  const box = h("span", { class: "crop-box", hidden: true });
  const cover = h("div", { class: "crop-cover", hidden: true }, box);
  const element = h("button", { type: "button", hidden: true, "aria-pressed": "false", onclick: () => turn(cover.hidden) }, "Crop");
  pad.element.append(cover);
  let from = null;

  const turn = (on) => {
    cover.hidden = !on;
    box.hidden = true;
    from = null;
    element.setAttribute("aria-pressed", on);
  };
  const place = (event) => {
    const frame = cover.getBoundingClientRect();
    return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height].map((part) => Math.min(Math.max(part, 0), 1));
  };
  const span = (event) => {
    const to = place(event);
    return from.map((start, axis) => [Math.min(start, to[axis]), Math.abs(start - to[axis])]);
  };
  cover.addEventListener("pointerdown", (event) => {
    cover.setPointerCapture(event.pointerId);
    from = place(event);
  });
  cover.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [[left, wide], [top, tall]] = span(event);
    box.hidden = false;
    Object.assign(box.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * wide}%`, height: `${100 * tall}%` });
  });
  cover.addEventListener("pointerup", async (event) => {
    if (!from) return;
    const parts = span(event);
    turn(false);
    if (parts.every(([, size]) => size >= LEAST)) take(await pad.cut(parts));
  });
  return { element };
}
