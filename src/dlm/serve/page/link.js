// The settings of a run in the address, so that a link reproduces it; and finished runs as files.

import { file } from "./stream.js";

const NAMES = ["model", "sampler", "steps", "temperature", "length", "seed"];
const MAX_ADDRESS_CHARACTERS = 6000; // longer ones are cut by some programs

// runs: one or two of {value, canvas, own}; canvas: the row of a request that kept tokens, own: its parts that the user locked
export function write(prompt, runs) {
  const words = new URLSearchParams({ prompt });
  runs.forEach(({ value, canvas, own }, j) => {
    const mark = j ? "b." : "";
    for (const name of NAMES) if (value[name] !== undefined) words.set(mark + name, value[name]);
    if (canvas) words.set(`${mark}canvas`, JSON.stringify(canvas));
    if (own?.size) words.set(`${mark}own`, [...own].join("."));
  });
  const hash = `#${words}`;
  if (hash.length <= MAX_ADDRESS_CHARACTERS) history.replaceState(null, "", hash);
  return hash.length <= MAX_ADDRESS_CHARACTERS;
}

export function read() {
  const words = new URLSearchParams(location.hash.slice(1));
  if (!words.has("prompt") && !words.has("model")) return null;
  const runs = ["", "b."].map(mark => {
    const value = {};
    for (const name of NAMES) {
      const word = words.get(mark + name);
      if (word === null || word === "") continue;
      value[name] = NAMES.indexOf(name) < 2 ? word : Number(word);
      if (Number.isNaN(value[name])) delete value[name];
    }
    let canvas = null;
    try { canvas = JSON.parse(words.get(`${mark}canvas`) || "null"); } catch { /* a damaged link: without its canvas */ }
    const own = new Set((words.get(`${mark}own`) || "").split(".").filter(Boolean).map(Number));
    return { value, canvas: Array.isArray(canvas) ? canvas : null, own };
  });
  return { prompt: words.get("prompt") || "", runs: words.has("b.model") ? runs : runs.slice(0, 1) };
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // pages that came without encryption have no clipboard but the old one
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// A picture needs no confidences and alternatives, which are most of a trace.
const lean = trace => ({ ...trace, steps: trace.steps.map(step => ({ ...step, changed: step.changed.map(change => change.slice(0, 4)) })) });

export async function save(format, traces) {
  const blob = format === "json" ? new Blob([JSON.stringify({ format: "dlm-trace-1", traces })], { type: "application/json" }) : await file(format, traces.map(lean));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `dlm-run.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
