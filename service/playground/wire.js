// What went over the wire: the exact request as curl and as Python, and the answer as it came.

import { address, hasKey } from "./api.js";
import { h } from "./dom.js";

/** Return the panel and `exchange(request, text)`, which shows one. A request is {body} or {file}. */
export function buildWire(model) {
  const url = address(`${model.path}:predict`);
  const texts = { curl: "", Python: "", Answer: "" };
  const code = h("code", null);
  const box = h("pre", { tabindex: "0", role: "tabpanel", id: "wire-text", "aria-labelledby": "wire-curl" }, code);
  const save = h("a", { class: "button quiet", hidden: true });
  const copy = h("button", { type: "button", class: "quiet copy", onclick: () => copyText(texts[chosen], copy) }, "Copy");
  let chosen = "curl";

  const choose = (name, focus) => {
    chosen = name;
    for (const tab of tabs) {
      const on = tab.textContent === name;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
    box.setAttribute("aria-labelledby", `wire-${name}`);
    code.textContent = texts[name] || "Nothing has been sent yet.";
  };
  const names = Object.keys(texts);
  const tabs = names.map((name) =>
    h("button", {
      type: "button", role: "tab", id: `wire-${name}`, "aria-controls": "wire-text", onclick: () => choose(name),
      onkeydown: (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) choose(names[(names.indexOf(chosen) + step + names.length) % names.length], true);
      },
    }, name),
  );
  choose("curl");
  return {
    element: h("section", { class: "panel wire", "aria-label": "Request and answer" },
      h("div", { class: "wire-head" }, h("div", { role: "tablist", "aria-label": "Request and answer" }, tabs), h("div", null, save, copy)), box),
    exchange(request, text) {
      offer(save, request);
      texts.curl = writeCurl(url, request);
      texts.Python = writePython(url, request);
      texts.Answer = layOut(text);
      choose(chosen);
    },
  };
}

/** Offer the picture that was drawn as the file that the commands name. */
function offer(save, { file, isDrawn }) {
  save.hidden = !isDrawn;
  if (!isDrawn) return;
  URL.revokeObjectURL(save.href);
  save.href = URL.createObjectURL(file);
  save.download = file.name;
  save.textContent = `Save ${file.name}`;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // the page is not on https or localhost
  }
  setTimeout(() => (button.textContent = "Copy"), 1600);
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return a request as a command of curl. */
export function writeCurl(url, { body, file }) {
  const lines = [`curl ${quote(url)}`];
  if (hasKey()) lines.push('-H "X-API-Key: $API_KEY"');
  if (file) lines.push(`-X POST -H ${quote(`Content-Type: ${file.type}`)} -T ${quote(file.name)}`);
  else lines.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

/** Return a request as a Python program that needs no package. */
function writePython(url, { body, file }) {
  const type = JSON.stringify(file ? file.type : "application/json");
  const lines = [
    "import json", ...(hasKey() ? ["import os"] : []), ...(file ? ["from pathlib import Path"] : []), "from urllib.request import Request, urlopen", "",
    file ? `body = Path(${JSON.stringify(file.name)}).read_bytes()` : `body = json.dumps(${toPython(body)}).encode()`,
    `headers = {"Content-Type": ${type}${hasKey() ? ', "X-API-Key": os.environ["API_KEY"]' : ""}}`,
    `with urlopen(Request(${JSON.stringify(url)}, body, headers)) as answer:`,
    "    print(json.load(answer))",
  ];
  return lines.join("\n");
}

/** Return a JSON value as Python writes it. */
function toPython(value) {
  if (value === null || typeof value === "boolean") return { null: "None", true: "True", false: "False" }[value];
  if (Array.isArray(value)) return `[${value.map(toPython).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${toPython(each)}`).join(", ")}}`;
}

/** Return JSON text with line breaks; no token of it is changed, and a list of numbers stays on one line. */
export function layOut(text) {
  let depth = 0;
  return text.replace(/("(?:\\.|[^"\\])*")|\[[-+.\deE,\s]*\]|[{}[\],:]/g, (token, string) => {
    if (string) return token;
    if (token.length > 1) return token.replaceAll(",", ", ");
    const line = () => `\n${"  ".repeat(depth)}`;
    if (token === "{" || token === "[") {
      depth += 1;
      return token + line();
    }
    if (token === "}" || token === "]") {
      depth -= 1;
      return line() + token;
    }
    return token === "," ? token + line() : ": ";
  });
}
