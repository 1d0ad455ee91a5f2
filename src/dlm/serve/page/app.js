// The page: the action of every click and key.

import { TextPane } from "./canvas.js";
import * as editor from "./editor.js";
import * as examples from "./examples.js";
import { inspect, leave } from "./inspect.js";
import * as link from "./link.js";
import * as prompt from "./prompt.js";
import { run } from "./run.js";
import { Settings } from "./settings.js";
import { models, setKey } from "./stream.js";
import { Transport } from "./transport.js";
import * as keys from "./keys.js";
import * as theme from "./theme.js";

const $ = id => document.getElementById(id);
const LETTERS = ["A", "B"];
const [PRESS, TWICE] = matchMedia("(pointer: coarse)").matches ? ["Tap", "double-tap"] : ["Click", "double-click"];
const HOW = `${PRESS} a token to keep it, ${TWICE} to rewrite it; Shift or a selection locks several.`;
const page = { settings: [], panes: [], running: null, waiting: false, heat: false, compare: false, link: null };
const transport = new Transport(draw);
transport.ended = () => settle();

const shown = () => page.panes.slice(0, page.compare ? 2 : 1);
const traces = () => shown().map(pane => pane.trace).filter(Boolean);
const frame = pane => transport.frame(pane.trace);
const plural = (n, word, many = `${word}s`) => `${n} ${n === 1 ? word : many}`;

function facts(pane) {
  const { trace } = pane, k = frame(pane), passes = trace.passes[k], settled = trace.settled[k];
  const planned = trace.over ? trace.passes[trace.last] : trace.planned;
  const words = [planned ? `pass ${passes} of ${planned}` : plural(passes, "pass", "passes")];
  if (settled && passes) words.push(`${(settled / passes).toFixed(1)} tokens a pass`);
  words.push(`${trace.holes ? Math.round(100 * settled / trace.holes) : 100}% settled`);
  if (trace.seconds[k]) words.push(`${trace.seconds[k].toFixed(1)} s`);
  words.push(`seed ${trace.begin.seed}`);
  return words.map(word => word.replaceAll(" ", "\u00a0")).join(" · "); // breaks between facts alone
}

function draw(motion = false) {
  for (const pane of shown()) {
    if (!pane.trace) continue;
    pane.draw(frame(pane), page.heat && pane.trace.over, transport.rest, motion);
    pane.facts.textContent = facts(pane);
    const locked = [...pane.locked].filter(i => editor.yours(pane, i)).length;
    const rest = !page.running && pane.editable;
    pane.act.hidden = !rest;
    pane.act.querySelector("[data-act=free]").hidden = !locked;
    pane.act.querySelector(".tip").textContent = locked ? `${plural(locked, "token")} locked` : HOW;
  }
  transport.show(traces().length ? shown().filter(pane => pane.trace).map(pane => pane.facts.textContent).join("; ") : "");
}

function say(text) { $("said").textContent = text; }

function complain(error) {
  const text = typeof error === "string" ? error : error.message;
  $("error").textContent = text;
  $("error").hidden = !text;
  if (text) $("error").scrollIntoView({ block: "nearest" });
  if (error.status === 401) {
    $("key").hidden = false;
    $("token").focus();
  }
}

function title(pane, j) {
  const { model, sampler } = page.settings[j].value;
  return pane.trace ? `${pane.trace.begin.model}, ${pane.trace.begin.sampler}` : `${model}, ${sampler}`;
}

function preview() {
  const parts = prompt.parse($("prompt").value), first = page.settings[0];
  if (!first?.model) return;
  const { text, wrong } = prompt.hint(parts, first.model, $("prompt").value);
  $("hint").textContent = text;
  $("hint").classList.toggle("wrong", wrong);
  $("more").textContent = page.settings.slice(0, page.compare ? 2 : 1).map(one => one.digest).join("  |  ");
  shown().forEach((pane, j) => {
    pane.head.textContent = page.compare ? `${LETTERS[j]}  ${title(pane, j)}` : "";
    if (!pane.trace) {
      const { model, value } = page.settings[j], { grid } = model.dlm;
      if (grid) pane.previewPuzzle(prompt.puzzle($("prompt").value, grid).cells, grid);
      else pane.preview(parts, value.length ?? Math.min(model.dlm.window, model.dlm.characters ? 256 : 64), model.dlm.characters);
    }
  });
}

async function generate(rows = [null, null], only = null) {
  complain("");
  const settings = page.settings.slice(0, page.compare ? 2 : 1), typed = $("prompt").value;
  const wrong = settings.map(({ wrong: field, model: { dlm: { grid } } }) => field || (grid ? prompt.puzzle(typed, grid).wrong : "")).find(Boolean);
  if (wrong) return complain(wrong);
  page.running?.abort();
  const stopper = page.running = new AbortController();
  const usual = 1 + Math.floor(Math.random() * 9999); // both sides of a comparison begin alike
  busy(true);
  leave();
  const chosen = shown().map((pane, j) => only === null || only === pane ? j : -1).filter(j => j >= 0);
  const values = settings.map(one => ({ seed: usual, ...one.value }));
  for (const j of chosen) {
    page.panes[j].root.classList.add("waiting");
    if (only) values[j].seed = only.trace.begin.seed + 1; // a rest that was not there before
  }
  page.panes.forEach(({ trace }, j) => { if (!chosen.includes(j) && trace && values[j]) values[j].seed = trace.begin.seed; });
  setHeat(false);
  page.waiting = true;
  page.link = link.write($("prompt").value, values.map((value, j) => ({ value, ...rows[j] })));
  say("Generating.");
  const runs = chosen.map(j => {
    const request = prompt.body(values[j], $("prompt").value, rows[j]?.canvas ?? null, settings[j].model);
    return run(page.panes[j], request, settings[j].model, stopper.signal, trace => {
      page.panes[j].root.classList.remove("waiting");
      if (trace.last || trace.over) transport.add(traces());
      else { transport.follow(traces()); preview(); }
    }, rows[j]?.own);
  });
  const ends = await Promise.allSettled(runs);
  if (page.running !== stopper) return;
  page.waiting = false;
  for (const pane of page.panes) pane.root.classList.remove("waiting");
  const failed = ends.find(end => end.status === "rejected");
  if (failed) {
    if (!failed.reason.message || !("status" in failed.reason)) console.error(failed.reason);
    complain(failed.reason);
  }
  if (!transport.live) settle();
}

function settle() { // the run is over and shown to its end
  if (page.waiting) return;
  page.running = null;
  busy(false);
  transport.icon();
  draw();
  preview();
  const told = traces().map(trace => `${plural(trace.settled.at(-1), "token")} in ${plural(trace.passes.at(-1), "forward pass", "forward passes")}: ${trace.text().slice(0, 1000)}`);
  if (told.length) say(`Done. ${told.join(" Beside it: ")}`);
}

function stop() {
  if (!page.running) return;
  page.running.abort();
  transport.pause();
  transport.go(transport.max);
  say("Stopped.");
}

function busy(on) {
  const held = document.activeElement === $("generate") || document.activeElement === $("stop");
  $("generate").hidden = on;
  $("stop").hidden = !on;
  if (held) $(on ? "stop" : "generate").focus();
  $("heat").disabled = on || !traces().length;
  $("keep").classList.toggle("off", on || !traces().length);
  document.body.classList.toggle("running", on);
  transport.icon();
}

function regenerate(pane) {
  if (page.running || !pane.editable) return;
  const rows = [null, null];
  rows[page.panes.indexOf(pane)] = editor.canvas(pane);
  generate(rows, pane);
}

function setCompare(on) {
  page.compare = on;
  $("compare").setAttribute("aria-pressed", on);
  document.body.classList.toggle("two", on);
  page.settings[1].root.hidden = page.panes[1].root.hidden = !on;
  transport.traces = traces();
  transport.pause();
  transport.at = transport.max;
  if (on && !page.panes[1].trace && !page.linked) {
    const { noise, value } = page.settings[0].other();
    page.settings[1].value = value;
    if (noise) page.settings[1].pickNoise(noise);
  }
  preview();
  draw();
}

function setHeat(on) {
  page.heat = on && traces().length > 0;
  $("heat").setAttribute("aria-pressed", page.heat);
  $("ramp").hidden = !page.heat;
  $("legend").hidden = page.heat;
  document.body.classList.toggle("hot", page.heat);
  draw();
}

function changeToken(pane, i, change) {
  change();
  draw();
  pane.focus(i, frame(pane));
}

function rewrite(pane, i) {
  leave();
  transport.pause();
  transport.go(transport.max);
  editor.edit(pane, i, text => {
    if (text !== null) editor.rewrite(pane, i, text);
    draw();
    pane.focus(i, frame(pane));
  });
}

function flash(button, word) { // a word in its place, for a moment
  const usual = button.dataset.usual ??= button.textContent;
  button.textContent = word;
  say(`${word}.`);
  setTimeout(() => { button.textContent = usual; }, 1500);
}

const actions = {
  again: regenerate,
  free: pane => {
    pane.locked = new Set([...editor.given(pane.trace.begin)].filter(i => !editor.yours(pane, i)));
    pane.edited.clear();
    draw();
  },
  range: pane => {
    if (pane.selected) editor.lock(pane, ...pane.selected);
    getSelection().removeAllRanges();
    draw();
  },
  copy: async (pane, button) => flash(button, await link.copy(pane.trace.text()) ? "Copied" : "Not copied"),
};

function addPane() {
  const pane = new TextPane($("pane").content.cloneNode(true).firstElementChild);
  pane.head = pane.root.querySelector("h2");
  pane.facts = pane.root.querySelector(".facts");
  pane.act = pane.root.querySelector(".act");
  pane.act.addEventListener("click", event => {
    const name = event.target.dataset?.act;
    if (name) actions[name](pane, event.target);
  });
  const place = event => { const span = event.target.closest?.("[data-i]"); return span ? Number(span.dataset.i) : -1; };
  let last = null; // the token that was clicked last, as it stood before: a double click is no lock
  pane.text.addEventListener("mousedown", event => { if (event.shiftKey) event.preventDefault(); }); // tokens are selected, not text
  pane.act.querySelector("[data-act=range]").addEventListener("mousedown", event => event.preventDefault()); // the selection stays
  pane.text.addEventListener("click", event => {
    const i = place(event);
    if (i < 0 || !pane.editable || (event.detail > 1 && last?.i === i) || !getSelection().isCollapsed) return;
    last = { i, was: editor.kept(pane, i) };
    const range = event.shiftKey && pane.anchor >= 0;
    changeToken(pane, i, () => range ? editor.lock(pane, pane.anchor, i) : editor.toggle(pane, i));
  });
  pane.text.addEventListener("dblclick", event => {
    const i = place(event);
    getSelection().removeAllRanges();
    if (i < 0 || !pane.editable) return;
    if (last?.i === i) editor.restore(pane, last.was);
    rewrite(pane, i);
  });
  const over = event => { const i = place(event); if (i >= 0 && pane.trace) inspect(pane, i, frame(pane)); };
  pane.text.addEventListener("pointerover", over);
  pane.text.addEventListener("pointerleave", leave);
  pane.text.addEventListener("focusin", over);
  pane.text.addEventListener("focusout", leave);
  pane.text.addEventListener("keydown", event => {
    const i = place(event);
    if (i >= 0) keys.token(event, pane, i, { frame, regenerate, rewrite, change: changeToken });
  });
  $("panes").append(pane.root);
  page.panes.push(pane);
}

async function start() {
  let found;
  try { found = await models(); } catch (error) { return complain(error); }
  if (!found.length) return complain("This server has no model of dlm.");
  complain("");
  $("key").hidden = true;
  if (!page.settings.length) {
    page.settings = LETTERS.map(letter => new Settings(found, letter, () => page.settings.length && preview()));
    $("settings").replaceChildren(...page.settings.map(one => one.root));
    examples.show($("try"), found, {
      prompt: text => { $("prompt").value = text; keys.grow($("prompt")); },
      setting: (j, value) => { page.settings[j].value = value; },
      compare: setCompare,
      run: () => generate(),
    });
  }
  const wanted = link.read();
  page.linked = wanted?.runs.length > 1;
  if (wanted) {
    $("prompt").value = wanted.prompt;
    wanted.runs.forEach(({ value }, j) => { page.settings[j].value = value; });
  }
  setCompare(page.linked);
  keys.grow($("prompt"));
  preview();
  const missing = wanted?.runs.find(({ value }) => value.model && !found.some(model => model.id === value.model));
  if (missing) complain(`The model of this link, ${missing.value.model}, is not served here.`);
  else if (wanted) generate(wanted.runs.map(({ canvas, own }) => canvas && { canvas, own }));
}

$("form").addEventListener("submit", event => { event.preventDefault(); if (page.settings.length) generate(); else start(); });
$("stop").addEventListener("click", stop);
$("prompt").addEventListener("input", () => { keys.grow($("prompt")); preview(); });
$("compare").addEventListener("click", () => page.settings.length && !page.running && setCompare(!page.compare));
$("heat").addEventListener("click", () => setHeat(!page.heat));
$("unlock").addEventListener("click", () => { setKey($("token").value.trim()); $("token").value = ""; start(); });
$("token").addEventListener("keydown", event => { if (event.key === "Enter") { event.preventDefault(); $("unlock").click(); } });
$("more").addEventListener("click", () => {
  const open = $("more").getAttribute("aria-expanded") !== "true";
  $("more").setAttribute("aria-expanded", open);
  $("settings").classList.toggle("open", open);
});
$("keep").addEventListener("click", async event => {
  const format = event.target.dataset?.format;
  if (!format) return;
  $("keep").open = false;
  const button = $("keep").querySelector("summary");
  if (format === "link") {
    if (!page.link) return complain("This run is too long for a link: save it as a file.");
    return flash(button, await link.copy(location.href) ? "Copied" : "Not copied");
  }
  try {
    await link.save(format, shown().filter(pane => pane.trace).map(pane => pane.trace.record(page.compare ? title(pane, 0) : "")));
    flash(button, "Saved");
  } catch (error) { complain(error); }
});
keys.listen({ transport, stop, generate: () => $("form").requestSubmit(), compare: () => $("compare").click(), heat: () => !$("heat").disabled && setHeat(!page.heat) });
theme.listen();
theme.ramp(document.querySelector(".swatches"));
addEventListener("hashchange", start);
document.addEventListener("selectionchange", () => {
  for (const pane of page.panes) pane.act.querySelector("[data-act=range]").hidden = !pane.editable || !pane.selected;
});
LETTERS.forEach(addPane);
page.panes[1].root.hidden = true;
busy(false);
draw();
start();
