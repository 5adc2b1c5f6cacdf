// What went over the wire: the exact request as curl and as Python, and the answer as it came.

import { address, hasKey } from "./api.js";
import { h } from "./dom.js";

/** Return the panel and `exchange(request, text)`, which shows one. A request is {body} or {file}. */
export function buildWire(model) {
  const url = address(`${model.path}:predict`);
  const texts = { curl: "", Python: "", Answer: "" };
  const code = h("code", null);
  const box = h("pre", { tabindex: "0", role: "tabpanel", id: "wire-text", "aria-labelledby": "wire-curl" }, code);
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
      h("div", { class: "wire-head" }, h("div", { role: "tablist", "aria-label": "Request and answer" }, tabs), copy), box),
    exchange(request, text) {
      texts.curl = writeCurl(url, request);
      texts.Python = writePython(url, request);
      texts.Answer = layOut(text);
      choose(chosen);
    },
  };
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
  if (file) lines.push(`-H ${quote(`Content-Type: ${file.type}`)}`, `--data-binary ${quote(`@${file.name}`)}`);
  else lines.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

function writePython(url, { body, file }) {
  const headers = [];
  if (hasKey()) headers.push('"X-API-Key": os.environ["API_KEY"]');
  if (file) headers.push(`"Content-Type": ${JSON.stringify(file.type)}`);
  const given = [
    JSON.stringify(url),
    file ? `data=Path(${JSON.stringify(file.name)}).read_bytes()` : `json=${JSON.stringify(body)}`,
    ...(headers.length ? [`headers={${headers.join(", ")}}`] : []),
  ];
  const imports = [...(hasKey() ? ["import os"] : []), ...(file ? ["from pathlib import Path"] : [])];
  const head = [...imports, ...(imports.length ? [""] : []), "import requests", ""];
  return [...head, "answer = requests.post(", ...given.map((line) => `    ${line},`), ")", "print(answer.json())"].join("\n");
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
