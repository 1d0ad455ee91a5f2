// One text, token by token. While it is written nothing jumps: a line breaks only after text that has settled; afterwards
// the end is known, and every token stands at its place from the first step on.

import { blend } from "./blend.js";
import { last } from "./trace.js";

const HEATS = 12, MAX_ANIMATED_TOKENS = 700; // a longer text is not animated when its lines move
const still = matchMedia("(prefers-reduced-motion: reduce)");
const NAMES = { g: "given", n: "noise", d: "draft", f: "fresh", c: "committed", x: "rejected" };

export const visible = text => Array.from(text.replace(/\t/g, "    "), char =>
  char === "\n" ? "↵" : char < " " ? String.fromCharCode(0x2400 + char.charCodeAt(0)) : /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]/u.test(char) ? "\ufffd" : char).join("");

export function quoted(entry) {
  if (entry.mask) return "noise";
  const text = visible(entry.text);
  return text === "" ? "part of a character" : text.trim() === "" ? "space" : text === "↵" ? "line break" : `“${text}”`;
}

const ink = ground => { // of a text that reads well there
  const [red, green, blue] = [1, 3, 5].map(i => parseInt(ground.slice(i, i + 2), 16));
  return .3 * red + .59 * green + .11 * blue > 115 ? "#1d1006" : "#f6f2ff";
};

export class TextPane {
  constructor(root) {
    this.root = root;
    this.text = root.querySelector(".text");
    this.trace = null;
    this.locked = new Set();
    this.own = new Set(); // locked by the user in a run before this one
    this.edited = new Map();
    this.anchor = -1; // the token that was locked or let go last, where a range begins
    this.spans = [];
    this.current = 0;
  }

  get editable() { return Boolean(this.trace?.over); }

  blankSheet(grid, characters) {
    this.trace = null;
    this.shape(grid);
    this.text.classList.toggle("letters", characters);
    this.text.classList.add("preview");
    this.text.removeAttribute("aria-label");
  }

  // Cells in rows of a square in place of lines of text; grid: {axes, tile, colours?} of the model, or nothing
  shape(grid) {
    this.grid = grid;
    this.text.classList.toggle("cells", Boolean(grid));
    if (grid) this.text.style.setProperty("--columns", grid.axes.at(-1));
  }

  // The colour of a token of its own, or nothing
  paint(span, colour) {
    span.classList.toggle("own", Boolean(colour));
    if (!colour) return;
    span.style.setProperty("--own", colour);
    span.style.setProperty("--own-ink", ink(colour));
  }

  // Tokens, in a grid with the borders behind its tiles
  fill(spans) {
    const borders = (name, count, size) => Array.from({ length: Math.ceil(count / size) - 1 }, (_, n) => {
      const line = document.createElement("i");
      line.className = `border ${name}`;
      line.style.setProperty("--line", (n + 1) * size + 1);
      return line;
    });
    const { axes, tile } = this.grid ?? {};
    this.text.replaceChildren(...spans, ...axes ? [...borders("right", axes.at(-1), tile.at(-1)), ...borders("below", axes.at(-2) ?? 1, tile.at(-2) ?? 1)] : []);
  }

  previewPuzzle(cells, grid) {
    this.blankSheet(grid, true);
    this.fill(cells.map(cell => {
      const span = cell === null ? this.blank(true) : document.createElement("span");
      if (cell !== null) {
        span.className = "tok g";
        span.textContent = cell;
        this.paint(span, grid.colours?.[[...grid.symbols].indexOf(cell)]);
      }
      return span;
    }));
  }

  // The canvas of the next request: typed text and its holes. length: of the whole, in tokens
  preview(parts, length, characters) {
    this.blankSheet(null, characters);
    const spans = parts.map(part => {
      const span = document.createElement("span");
      span.className = typeof part === "number" ? "tok n mask" : "tok g";
      if (typeof part === "number") return Array.from({ length: Math.min(part, 2000) }, () => this.blank(characters));
      span.textContent = part;
      return [span];
    }).flat();
    const open = parts.some(part => typeof part === "number") ? 0 : Math.max(0, length - Math.ceil(parts.join("").length / (characters ? 1 : 4)));
    for (let i = 0; i < Math.min(open, 2000); i++) spans.push(this.blank(characters));
    this.text.replaceChildren(...spans);
  }

  blank(characters) {
    const span = document.createElement("span");
    span.className = "tok n mask";
    span.textContent = characters ? "a" : "aaa";
    span.setAttribute("aria-hidden", "true");
    return span;
  }

  show(trace, { characters, drafting }, locked = new Set(), own = new Set()) {
    this.trace = trace;
    this.shape(trace.begin.grid);
    this.own = own;
    this.anchor = -1;
    this.characters = characters;
    this.locked = locked;
    this.edited = new Map();
    this.drawn = [];
    this.now = "";
    this.broken = null;
    this.current = 0;
    this.text.classList.toggle("letters", characters);
    this.text.classList.toggle("drafting", drafting);
    this.text.classList.remove("preview");
    this.spans = trace.history.map((_, i) => {
      const span = document.createElement("span");
      span.dataset.i = i;
      span.tabIndex = i ? -1 : 0;
      span.setAttribute("role", "button");
      return span;
    });
    this.fill(this.spans);
    this.text.setAttribute("aria-label", "The text, token by token. Arrow keys move, space locks a token, Enter rewrites it.");
  }

  // Where lines break: known at the end; until then, only after text that has settled from the start on.
  breaks(k) {
    const { trace } = this, places = [];
    let steady = true; // so far nothing is open
    for (let i = 0; i < trace.length; i++) {
      const entry = trace.over ? trace.final(i) : trace.at(i, k);
      steady &&= trace.over || "gfc".includes(entry.state);
      if ((steady || entry.state === "g") && entry.text.endsWith("\n") && !entry.mask) places.push(i);
    }
    return places;
  }

  lay(k) {
    if (this.grid) { this.broken = []; return; } // cells stay where they are
    const places = this.breaks(k), grid = !this.trace.over, old = this.broken;
    if (old && this.text.classList.contains("grid") === grid && places.length === old.length && places.every((p, j) => p === old[j])) return;
    const move = old && !still.matches && this.spans.length <= MAX_ANIMATED_TOKENS;
    const before = move ? this.spans.map(span => [span.offsetLeft, span.offsetTop]) : null;
    this.broken = places;
    this.text.classList.toggle("grid", grid);
    for (const line of this.text.querySelectorAll("br")) line.remove();
    for (const i of places) this.spans[i].after(document.createElement("br"));
    if (!move) return;
    const after = this.spans.map(span => [span.offsetLeft, span.offsetTop]);
    this.spans.forEach((span, i) => {
      const x = before[i][0] - after[i][0], y = before[i][1] - after[i][1];
      if (x || y) span.animate([{ left: `${x}px`, top: `${y}px` }, { left: 0, top: 0 }], { duration: 420, easing: "cubic-bezier(.2,.7,.2,1)" });
    });
  }

  look(i, k) { // the entry as it is shown: where nothing moves any more, nothing is fresh
    const entry = this.trace.at(i, k);
    return this.rest && entry.state === "f" ? { ...entry, state: "c", struck: "" } : entry;
  }

  draw(k, heat = false, rest = false, motion = false) {
    const { trace } = this;
    if (!trace) return;
    const now = `${k} ${heat} ${rest} ${trace.over}`;
    if (motion && now === this.now) return; // a clock tick between two steps
    this.now = now;
    this.rest = rest;
    this.lay(k);
    const breaks = new Set(this.broken), end = trace.last || 1;
    for (let i = 0; i < trace.length; i++) {
      const entry = this.look(i, k), final = trace.over ? trace.final(i) : null, edit = this.edited.get(i);
      let text = visible(edit ?? entry.text);
      if (entry.mask && edit === undefined) text = this.room(final);
      else if (breaks.has(i) && text.endsWith("↵")) text = `${text.slice(0, -1)} `;
      const likely = edit === undefined ? entry.blend : null;
      const names = ["tok", likely ? "l" : entry.state];
      if (entry.mask) names.push("mask");
      if (this.locked.has(i)) names.push("locked");
      if (edit !== undefined) names.push("edited");
      if (heat && !likely && entry.state !== "g" && entry.frame) names.push("heat", `h${Math.min(HEATS - 1, Math.floor((this.changedBy(i, k) - 1) / end * HEATS))}`);
      const sure = entry.state === "d" && entry.confidence != null ? entry.confidence.toFixed(1) : "1"; // an unsure draft is fainter
      const struck = entry.state === "f" && entry.struck ? visible(entry.struck) : "";
      const key = `${names.join(" ")} ${sure} ${text} ${struck} ${likely ?? ""}`;
      if (this.drawn[i] === key) continue;
      this.drawn[i] = key;
      const span = this.spans[i];
      span.className = names.join(" ");
      this.paint(span, !entry.mask && "gc".includes(entry.state) && edit === undefined && this.grid?.colours?.[entry.id]);
      span.style.setProperty("--sure", sure);
      if (struck) span.dataset.struck = struck; else delete span.dataset.struck;
      if (span.textContent !== text) span.textContent = text;
      blend(span, likely?.map(([one, share]) => [visible(one), share]));
    }
  }

  changedBy(i, k) { // the frame of the last change of the text up to k
    const { frames, entries } = this.trace.history[i];
    let j = Math.max(0, last(frames, k));
    while (j > 1 && entries[j - 1].id === entries[j].id) j--;
    return Math.max(1, frames[j]);
  }

  room(final) { // a mask is as wide as its final text, where that is known
    if (final && !final.mask) return visible(final.text).replace(/[↵ ]/g, "\u00a0") || "\u200b";
    return this.characters ? "a" : "aaa";
  }

  label(i, k) {
    const entry = this.look(i, k), edit = this.edited.get(i);
    const parts = [edit !== undefined ? `“${visible(edit)}”, rewritten` : entry.blend ? "a blend" : `${quoted(entry)}, ${NAMES[entry.state]}`];
    const odds = pairs => pairs.map(([text, p]) => `${visible(text) || "nothing"} ${Math.round(100 * p)} percent`).join(", ");
    if (entry.blend) parts.push(odds(entry.blend));
    if (entry.frame) parts.push(`forward pass ${this.trace.passes[entry.frame]}`);
    if (entry.confidence != null) parts.push(`confidence ${Math.round(100 * entry.confidence)} percent`);
    if (entry.alternatives?.length) parts.push(`also possible: ${odds(entry.alternatives)}`);
    if (this.locked.has(i)) parts.push("locked");
    return parts.join(", ");
  }

  // The first and the last token of the text that is selected in this pane, null for none.
  get selected() {
    const { anchorNode, focusNode, isCollapsed } = getSelection();
    if (isCollapsed || !this.text.contains(anchorNode) || !this.text.contains(focusNode)) return null;
    const ends = [anchorNode, focusNode].map(node => (node.nodeType === Node.TEXT_NODE ? node.parentNode : node).closest?.("[data-i]"));
    return ends.every(Boolean) ? ends.map(span => Number(span.dataset.i)) : null;
  }

  // Roving focus: one token can be reached by Tab, arrows move on.
  focus(i, k) {
    i = Math.max(0, Math.min(this.spans.length - 1, i));
    this.spans[this.current].tabIndex = -1;
    this.current = i;
    const span = this.spans[i];
    span.tabIndex = 0;
    span.setAttribute("aria-label", this.label(i, k));
    span.setAttribute("aria-pressed", this.locked.has(i));
    span.focus({ preventScroll: false });
  }

  near(i, lines) { // the token on the next line that stands nearest
    const box = this.spans[i].getBoundingClientRect(), x = box.left + box.width / 2;
    let best = i, least = Infinity;
    this.spans.forEach((span, j) => {
      const other = span.getBoundingClientRect(), rows = Math.round((other.top - box.top) / box.height);
      const away = Math.abs(rows - lines) < 0.6 && Math.sign(rows) === lines ? Math.abs(other.left + other.width / 2 - x) : Infinity;
      if (away < least) { least = away; best = j; }
    });
    return best;
  }
}
