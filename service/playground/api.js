// The service's API. Every address is relative to the page, so that all works behind a path prefix.

import { h } from "./dom.js";

const STORED = "playground-key";
let key = sessionStorage.getItem(STORED) ?? "";
let asking = null;
let lost = null; // the timer that asks whether the service is back

/** A failure with a sentence fit for the page. */
export class Problem extends Error {}

/** Return the address of a path of the API, complete. */
export function address(path) {
  return new URL(path, new URL(".", document.baseURI)).href;
}

/** Tell whether the service wants a key. */
export function hasKey() {
  return key !== "";
}

/** Return the key that is sent, or nothing. */
export function readKey() {
  return key;
}

/** GET JSON. */
export async function get(path) {
  const { text } = await send(path, {});
  return JSON.parse(text);
}

/** GET a picture, as an address that an <img> can show. */
export async function getPicture(path) {
  const answer = await reach(path, {});
  return URL.createObjectURL(await answer.blob());
}

/** POST a body; return the answer decoded, its text, and the milliseconds it took. */
export async function post(path, body, type = "application/json") {
  const { text, ms } = await send(path, { method: "POST", body, headers: { "Content-Type": type } });
  return { answer: JSON.parse(text), text, ms };
}

async function send(path, options) {
  const began = performance.now();
  const answer = await reach(path, options);
  const text = await answer.text();
  return { text, ms: performance.now() - began };
}

async function reach(path, options) {
  const used = key;
  const headers = { ...options.headers, ...(used ? { "X-API-Key": used } : {}) };
  let answer;
  try {
    answer = await fetch(address(path), { ...options, headers });
  } catch {
    lose();
    throw new Problem("The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const sentence = await readError(answer);
  if (answer.status !== 401) throw new Problem(sentence);
  if (key === used) await askKey(sentence);
  return reach(path, options);
}

/** Say that the connection is lost, ask every two seconds, and dispatch `recovered` once the service answers. */
function lose() {
  if (lost) return;
  const banner = document.getElementById("banner");
  const show = (text) => {
    if (banner) banner.textContent = text;
    document.body.classList.toggle("lost", text !== "");
  };
  show("Connection lost, retrying…");
  lost = setInterval(async () => {
    try {
      await fetch(address("health/live"), { cache: "no-store" });
    } catch {
      return;
    }
    clearInterval(lost);
    lost = null;
    show("");
    document.dispatchEvent(new Event("recovered"));
  }, 2000);
}

async function readError(answer) {
  try {
    const { error } = await answer.json();
    if (typeof error === "string" && error) return `${error[0].toUpperCase()}${error.slice(1)}.`;
  } catch {
    // not JSON: something in front of the service answered
  }
  return `The service answered ${answer.status} without saying why.`;
}

/** Tell whether the user is being asked for the key. */
export function isAsking() {
  return asking !== null;
}

/** Ask for the key; all requests that need one wait for the same answer. Throws a Problem if the user gives none. */
export function askKey(reason) {
  asking ??= new Promise((resolve, reject) => {
    document.getElementById("key-button")?.removeAttribute("hidden");
    const input = h("input", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false", required: true });
    const take = (event) => {
      event.preventDefault();
      key = input.value.trim();
      sessionStorage.setItem(STORED, key);
      resolve();
      dialog.close();
    };
    const leave = () => {
      dialog.remove();
      asking = null;
      reject(new Problem("This service needs an API key.")); // nothing happens if there is one by now
    };
    const dialog = h("dialog", {
      id: "key-dialog", "aria-labelledby": "key-title",
      onclose: leave,
    }, h("form", { onsubmit: take },
      h("h2", { id: "key-title" }, "This service asks for a key"),
      h("p", { id: "key-reason" }, reason),
      h("label", { for: "key-input" }, "API key"),
      input,
      h("p", { class: "hint" }, "It is kept in this tab alone, and forgotten when the tab is closed."),
      h("button", { type: "submit", class: "primary" }, "Use this key")));
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
  return asking;
}
