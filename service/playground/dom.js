// Elements from plain calls, and the few small things that every view needs.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Build an HTML element: `h("button", {class: "primary", onclick}, "Go")`. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Build an SVG element. */
export function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** Return a number as a person reads it: four digits that matter, and no more. */
export function show(value) {
  if (!Number.isFinite(value)) return String(value);
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** Return a probability as a percentage; never 100 % or 0 % for what is not. */
export function percent(value) {
  if (value > 0 && value < 0.001) return "< 0.1 %";
  if (value < 1 && value > 0.999) return "> 99.9 %";
  return `${(100 * value).toFixed(1)} %`;
}

/** Return a function that runs `work`, one run at a time, and once more after `pause()` ms when it was called meanwhile. */
export function oneAtATime(work, pause = () => 0) {
  let running = false;
  let again = false;
  return async () => {
    if (running) {
      again = true;
      return;
    }
    running = true;
    do {
      again = false;
      await work();
      if (pause()) await new Promise((resolve) => setTimeout(resolve, pause()));
    } while (again);
    running = false;
  };
}

let timer = 0;

/** Tell a screen reader, once things have been still for half a second. */
export function announce(text) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    document.getElementById("announcer").textContent = text;
  }, 500);
}

/** Return a theme colour, such as `colour("ink")`, as the scheme in use has it. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Return a theme colour `#rrggbb` as three numbers. */
export function channels(name) {
  const hex = colour(name).slice(1);
  return [0, 2, 4].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

/** Call `update` when the service is back after it was lost, as long as `element` is on the page. */
export function onRecovered(element, update) {
  const listen = () => (element.isConnected ? update() : document.removeEventListener("recovered", listen));
  document.addEventListener("recovered", listen);
}

/** Return the colour of a class as three numbers: the theme's for the first six, then hues far from each other. */
export function classColour(index) {
  if (index < 6) return channels(`class-${index}`);
  const [hue, part] = [(index * 137.508) % 360, 0.42 + 0.16 * (index % 3)];
  return [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (part - 0.55 * Math.min(part, 1 - part) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/** Return a list of classes with their colours; `entries` are pairs of index and label. */
export function buildLegend(entries) {
  return h("ul", { class: "legend" }, entries.map(([index, label]) => {
    const swatch = h("span", { class: "swatch" });
    swatch.style.background = `rgb(${classColour(index).join(" ")})`;
    return h("li", null, swatch, label);
  }));
}

/** Call `draw` when the scheme turns light or dark, as long as `element` is on the page. */
export function onScheme(element, draw) {
  const query = matchMedia("(prefers-color-scheme: dark)");
  const listen = () => (element.isConnected ? draw() : query.removeEventListener("change", listen));
  query.addEventListener("change", listen);
}
