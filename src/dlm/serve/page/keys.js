// Keys: on the page, and on a token.

import * as editor from "./editor.js";

export function grow(area) { // as high as its text
  area.style.setProperty("height", "auto");
  area.style.setProperty("height", `${Math.min(area.scrollHeight + 2, innerHeight * 0.3)}px`);
}

const typing = target => /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) && target.type !== "range";

export function listen({ transport, stop, generate, compare, heat }) {
  document.addEventListener("keydown", event => {
    const target = event.target, help = document.getElementById("help");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); return generate(); }
    if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented || help.open) return;
    if (event.key === "Escape") {
      document.getElementById("keep").open = false;
      return stop();
    }
    if (typing(target)) return;
    const button = /^(BUTTON|SUMMARY|A)$/.test(target.tagName);
    const act = {
      " ": () => !button && transport.play(!(transport.playing || transport.live)),
      ArrowRight: () => transport.jump(1), ArrowLeft: () => transport.jump(-1),
      Home: () => { transport.pause(); transport.go(0); }, End: () => { transport.pause(); transport.go(transport.max); },
      h: heat, c: compare, "?": () => help.showModal(), "/": () => document.getElementById("prompt").focus(),
    }[event.key];
    if (!act || (event.key === " " && button)) return;
    event.preventDefault();
    act();
  });
  document.getElementById("keys").addEventListener("click", () => document.getElementById("help").showModal());
  document.addEventListener("pointerdown", event => {
    const menu = document.getElementById("keep");
    if (menu.open && !menu.contains(event.target)) menu.open = false;
  });
}

export function token(event, pane, i, { frame, regenerate, rewrite, change }) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  const k = frame(pane), entry = pane.trace.at(i, k);
  const move = j => pane.focus(j, k);
  const act = {
    ArrowRight: () => move(i + 1), ArrowLeft: () => move(i - 1), ArrowDown: () => move(pane.near(i, 1)), ArrowUp: () => move(pane.near(i, -1)),
    Home: () => move(0), End: () => move(pane.spans.length - 1),
  }[event.key] || (pane.editable && {
    " ": () => change(pane, i, () => event.shiftKey && pane.anchor >= 0 ? editor.lock(pane, pane.anchor, i) : editor.toggle(pane, i)),
    Enter: () => rewrite(pane, i), r: () => regenerate(pane),
  }[event.key]);
  if (act) {
    event.preventDefault();
    event.stopPropagation();
    return act();
  }
  const other = pane.editable && /^[1-5]$/.test(event.key) && entry.alternatives?.[Number(event.key) - 1];
  if (other) {
    event.preventDefault();
    change(pane, i, () => editor.rewrite(pane, i, other[0]));
  }
}
