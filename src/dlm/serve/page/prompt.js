// Holes in a prompt: `___` is a hole of as many tokens as underscores (three or more), `[12]` one of twelve; `\[12]` and `\___` are text.

const HOLE = /\\(\[\d+\]|_{3,})|\[(\d{1,5})\]|(_{3,})/g;

export function parse(prompt) { // -> [string | number, ...], a number being a hole of so many tokens
  const parts = [];
  let text = "", from = 0;
  for (const match of prompt.matchAll(HOLE)) {
    text += prompt.slice(from, match.index);
    from = match.index + match[0].length;
    const size = match[2] !== undefined ? Number(match[2]) : match[3] ? match[3].length : 0;
    if (match[1] !== undefined) text += match[1];
    else if (!size) text += match[0];
    else {
      if (text) parts.push(text);
      text = "";
      parts.push(size);
    }
  }
  text += prompt.slice(from);
  if (text) parts.push(text);
  return parts;
}

export const holes = parts => parts.filter(part => typeof part === "number");

export const canvas = parts => parts.flatMap(part => typeof part === "number" ? Array(part).fill(null) : [part]);

// Of a model of grids the prompt is a puzzle: symbols row by row, a hole . or 0 or _, borders and spaces as one likes; nothing is all holes.
export function puzzle(prompt, grid) { // -> {cells: [string | null, ...], wrong: a line or ""}
  const found = [...prompt].filter(c => !/[\s|+│┃─━┼╋-]/.test(c)), size = grid.axes.reduce((a, b) => a * b, 1);
  const strange = found.find(c => !grid.symbols.includes(c) && !".0_".includes(c));
  const cells = Array.from({ length: size }, (_, i) => grid.symbols.includes(found[i] || ".") ? found[i] : null);
  let wrong = "";
  if (strange) wrong = `${strange} is no cell: write ${grid.symbols.length > 9 ? grid.symbols : [...grid.symbols].join(" ")}, and . for a hole.`;
  else if (found.length && found.length !== size) wrong = `${found.length} of ${size} cells (${grid.axes.join(" × ")}): write row by row, . for a hole.`;
  else if (!cells.includes(null)) wrong = "Every cell is given: leave holes to fill.";
  return { cells, wrong };
}

export function hint(parts, model, prompt = "") {
  if (model?.dlm.grid) {
    const { cells, wrong } = puzzle(prompt, model.dlm.grid), open = cells.filter(cell => cell === null).length;
    return { text: wrong || `${cells.length - open} cells given, ${open} to fill. A puzzle row by row, . for a hole.`, wrong: Boolean(wrong) };
  }
  const sizes = holes(parts), total = sizes.reduce((sum, size) => sum + size, 0);
  if (!sizes.length) return { text: "___ is a hole of three tokens, [12] one of twelve.", wrong: false };
  const open = typeof parts.at(-1) !== "number" || sizes.length > 1;
  if (model && !model.dlm.infills && open) {
    return { text: `${model.id} writes from left to right and cannot fill holes: pick another model.`, wrong: true };
  }
  const count = sizes.length === 1 ? "One hole" : `${sizes.length} holes`;
  return { text: `${count}, ${total} ${total === 1 ? "token" : "tokens"} to fill.`, wrong: false };
}

// The body of a request: a message to answer, a text to continue, a text with holes, or a canvas of the tokens that are kept.
export function body(value, text, row, model) {
  const parts = parse(text), { length, ...rest } = value;
  const all = { ...rest, alternatives: 3 };
  if (model.dlm.grid) return { temperature: 0, ...all, canvas: row || puzzle(text, model.dlm.grid).cells };
  if (row) return { ...all, canvas: row };
  if (holes(parts).length) return { ...all, canvas: canvas(parts) };
  if (model.dlm.chat) { // through its template
    const room = length === undefined ? {} : { max_tokens: length };
    return { ...all, messages: [{ role: "user", content: parts.join("") }], ...room };
  }
  const size = length === undefined ? {} : model.dlm.characters || model.dlm.kind === "diffusion" ? { length } : { max_tokens: length };
  return { ...all, prompt: parts.join(""), ...size };
}
