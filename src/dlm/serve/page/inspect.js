// The card beside a token: its state, its forward pass, the model's confidence, the alternatives.

import { quoted, visible } from "./canvas.js";

const STATES = {
  g: "given", n: "noise", d: "a draft, it may still change", f: "fresh, settled by this forward pass", c: "committed", x: "a rejected draft token",
};
const card = () => document.getElementById("card");

function line(className, ...parts) {
  const p = document.createElement("p");
  p.className = className;
  p.append(...parts);
  return p;
}

function bar(text, share, number) {
  const row = document.createElement("div"), name = document.createElement("span"), meter = document.createElement("i"), value = document.createElement("b");
  row.className = "odds";
  name.textContent = number ? `${number}  ${text}` : text;
  meter.style.setProperty("--share", Math.max(0.01, Math.min(1, share)));
  value.textContent = share >= 0.995 ? "100%" : share < 0.01 ? "<1%" : `${Math.round(100 * share)}%`;
  row.append(name, meter, value);
  return row;
}

export function inspect(pane, i, k) {
  const trace = pane.trace, span = pane.spans[i], entry = pane.look(i, k), edit = pane.edited.get(i);
  const rows = [line("what", edit === undefined ? quoted(entry) : `“${visible(edit)}”`)];
  const facts = [edit !== undefined ? "rewritten by you" : entry.blend ? "a blend, which sharpens" : STATES[entry.state]];
  if (entry.frame && edit === undefined) {
    facts.push(entry.change > 1 ? `change ${entry.change}, at pass ${trace.passes[entry.frame]}` : `at pass ${trace.passes[entry.frame]}`);
  }
  rows.push(line("when", facts.join(" · ")));
  const odds = pairs => pairs.forEach(([text, share], j) => rows.push(bar(visible(text).trim() || (text ? "space" : "part of a character"), share, j + 1)));
  if (edit === undefined && entry.blend) odds(entry.blend);
  else if (edit === undefined) {
    if (entry.confidence != null) rows.push(bar("confidence", entry.confidence));
    if (entry.alternatives?.length) {
      rows.push(line("when", "at that moment"));
      odds(entry.alternatives.slice(0, 5));
    }
  }
  if (pane.locked.has(i)) rows.push(line("when", entry.state === "g" ? "kept when you regenerate" : "locked"));
  card().replaceChildren(...rows);
  card().hidden = false;
  const box = card().getBoundingClientRect(), spot = span.getBoundingClientRect();
  const edge = pane.root.getBoundingClientRect().right, foot = document.getElementById("transport").getBoundingClientRect().top;
  const aside = innerWidth - edge > box.width + 32; // a note in the margin covers no text
  const left = aside ? edge + 24 : Math.max(8, Math.min(innerWidth - box.width - 8, spot.left + spot.width / 2 - box.width / 2));
  const top = aside ? Math.max(8, Math.min(foot - box.height - 8, spot.top - 8)) : spot.top > box.height + 14 ? spot.top - box.height - 10 : spot.bottom + 10;
  card().style.setProperty("left", `${left}px`);
  card().style.setProperty("top", `${top}px`);
}

export const leave = () => { card().hidden = true; };
