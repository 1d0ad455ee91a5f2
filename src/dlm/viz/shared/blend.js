// A blend of tokens at one place, drawn over one another, each as strong as it is likely. The replay and the served page share it.

const SHOWN = 3;

// likely: [text, share] pairs, the likeliest first, whose text the element holds already; null: no blend any more
export function blend(element, likely) {
  for (let i = 0; i < SHOWN; i++) {
    const [text, share] = likely?.[i] ?? ["", 0];
    if (!likely) element.style.removeProperty(`--p${i}`); else element.style.setProperty(`--p${i}`, share);
    if (!likely || !i) delete element.dataset[`p${i}`]; else element.dataset[`p${i}`] = text;
  }
}
