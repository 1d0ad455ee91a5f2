// Locking and rewriting tokens, and the canvas that a request for the rest is made of.

import { visible } from "./canvas.js";

// Whether the user locked or rewrote a token, in this run or in one before it; those of the prompt are locked by themselves.
export const yours = (pane, i) => pane.trace.begin.states[i] !== "g" || pane.edited.has(i) || pane.own.has(i);

// The row of a request: ids of given and locked tokens, the text of rewritten ones, null for every other token; and which of its parts
// are the user's own.
export function canvas(pane) {
  const { trace } = pane, row = [], own = new Set();
  for (let i = 0; i < trace.length; i++) {
    const entry = trace.final(i), edit = pane.edited.get(i);
    if (edit === "") continue;
    if (pane.locked.has(i) && yours(pane, i)) own.add(row.length);
    row.push(edit ?? (pane.locked.has(i) && !entry.mask ? entry.id : null));
  }
  return { canvas: row, own };
}

// Where the locked tokens of a canvas lie in the text that came of it: a rewritten one may have become several tokens.
// only: the parts of the row that count, all of them by default
export function places(row, begin, only = null) {
  const locked = new Set(), add = (part, i) => { if (!only || only.has(part)) locked.add(i); };
  let at = 0;
  for (const [j, part] of row.entries()) {
    if (part === null) at++;
    else if (typeof part === "number") add(j, at++);
    else {
      let text = "";
      do {
        add(j, at);
        text += begin.tokens[at++]?.[1] ?? part;
      } while (text.length < part.length && at < begin.tokens.length && begin.states[at] === "g");
    }
  }
  return locked;
}

// The tokens that share a character with token i: all but the last show nothing
export function character(trace, i) {
  const part = j => { const { text, mask } = trace.final(j); return !text && !mask; };
  let first = i, end = i;
  while (first > 0 && part(first - 1)) first--;
  while (part(end) && end + 1 < trace.length && !trace.final(end + 1).mask) end++;
  return Array.from({ length: end - first + 1 }, (_, j) => first + j);
}

export const given = begin => new Set([...begin.states].flatMap((state, i) => state === "g" ? [i] : []));

// The tokens of a character as they stand, to put them back.
export const kept = (pane, i) => character(pane.trace, i).map(j => ({ j, locked: pane.locked.has(j), text: pane.edited.get(j) }));

export function restore(pane, was) {
  for (const { j, locked, text } of was) {
    if (locked) pane.locked.add(j); else pane.locked.delete(j);
    if (text === undefined) pane.edited.delete(j); else pane.edited.set(j, text);
  }
}

export function lock(pane, from, to) { // every written token of a range, in whole characters
  for (let i = Math.min(from, to); i <= Math.max(from, to); i++) {
    if (!pane.trace.final(i).mask || pane.edited.has(i)) for (const j of character(pane.trace, i)) pane.locked.add(j);
  }
  pane.anchor = to;
}

export function toggle(pane, i) {
  pane.anchor = i;
  const free = pane.edited.has(i) || pane.locked.has(i); // letting go of a rewritten token brings back what stood there
  for (const j of character(pane.trace, i)) {
    pane.edited.delete(j);
    if (free) pane.locked.delete(j); else pane.locked.add(j);
  }
}

export function rewrite(pane, i, text) {
  const all = character(pane.trace, i), end = all.at(-1), same = text === pane.trace.final(end).text && !pane.edited.has(end);
  for (const j of all) {
    pane.locked.add(j);
    if (!same) pane.edited.set(j, j === end ? text : "");
  }
}

// An input in the place of token i; `done` is called with the text, or with null when it was given up.
export function edit(pane, i, done) {
  const span = pane.spans[i], box = document.createElement("input");
  const { text: final, mask } = pane.trace.final(character(pane.trace, i).at(-1));
  const before = pane.edited.get(i) ?? (mask ? "" : final);
  box.className = "rewrite";
  box.value = visible(before);
  box.spellcheck = false;
  box.setAttribute("aria-label", "Write instead; Enter keeps it, Escape leaves it as it was");
  const fit = () => box.style.setProperty("--letters", Math.max(2, [...box.value].length + 1));
  let over = false;
  const leave = text => {
    if (over) return;
    over = true;
    box.remove();
    span.hidden = false;
    done(text);
  };
  box.addEventListener("input", fit);
  box.addEventListener("keydown", event => {
    event.stopPropagation();
    if (event.key === "Enter") { event.preventDefault(); leave(box.value.replace(/↵/g, "\n")); }
    else if (event.key === "Escape") { event.preventDefault(); leave(null); }
  });
  box.addEventListener("blur", () => leave(box.value === visible(before) ? null : box.value.replace(/↵/g, "\n")));
  fit();
  span.hidden = true;
  span.before(box);
  box.focus();
  box.select();
}
