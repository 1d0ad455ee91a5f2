// Locking and rewriting tokens, and the canvas that a request for the rest is made of.

import { visible } from "./canvas.js";

// The row of a request: ids of given and locked tokens, the text of rewritten ones, null for every other token.
export function canvas(pane) {
  const { trace } = pane, row = [];
  for (let i = 0; i < trace.length; i++) {
    const entry = trace.final(i), edit = pane.edited.get(i);
    if (edit !== undefined) { if (edit) row.push(edit); }
    else row.push(pane.locked.has(i) && !entry.mask ? entry.id : null);
  }
  return row;
}

// Where the locked tokens of a canvas lie in the text that came of it: a rewritten one may have become several tokens.
export function places(row, begin) {
  const locked = new Set();
  let at = 0;
  for (const part of row) {
    if (part === null) at++;
    else if (typeof part === "number") locked.add(at++);
    else {
      let text = "";
      do {
        locked.add(at);
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

export function toggle(pane, i) {
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
