// Examples for a first visit: one press, and text settles.

const find = (models, test) => models.find(model => model.dlm.kind === "diffusion" && !model.dlm.grid && test(model));

const PUZZLES = [ // by cells and symbols
  [16, "1234", "1...2..1.14....."],
  [81, "123456789", "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"],
  [81, "#*:GS", ".#..S#.#.\n.#.#.#.#.\n...#.....\n.#######.\nG..#.....\n######.#.\n...#...#.\n##.#.###.\n.......#."],
  [54, "0123456789·", "68·60·\n09·00·\n60·60·\n090000\n689600\n······\n698___\n880___\n860___"],
];

const calm = model => model.dlm.kind === "diffusion" ? Math.min(64, model.dlm.steps || 64) : undefined; // steps that end soon

// page: {prompt(text), setting(j, value), compare(on), run()}
export function show(root, models, page) {
  const mask = find(models, model => model.dlm.noise === "mask" && model.dlm.infills) || find(models, model => model.dlm.infills);
  const alike = model => model.dlm.noise !== mask.dlm.noise && model.dlm.characters === mask.dlm.characters;
  const other = mask && (find(models, model => alike(model) && model.dlm.noise === "uniform") || find(models, alike));
  const letters = mask?.dlm.characters, first = mask || models.find(model => !model.dlm.grid);
  const opening = letters ? "ROMEO:\nBut soft" : "Once upon a time";
  const offers = [];
  if (first) {
    offers.push(["a beginning", () => {
      page.prompt(opening);
      page.setting(0, { model: first.id, steps: calm(first) });
    }]);
  }
  if (mask) {
    offers.push(["holes to fill", () => {
      page.prompt(letters ? "ROMEO:\n[32], my lord,\nAnd [28] of the king.\n\nJULIET:\n[30] love." : "The cat [6] because [8].");
      page.setting(0, { model: mask.id, steps: calm(mask) });
    }]);
    offers.push(["half the passes", () => {
      const steps = Math.max(2, calm(mask));
      page.prompt(opening);
      page.compare(true);
      page.setting(0, { model: mask.id, steps });
      page.setting(1, { model: mask.id, steps: Math.round(steps / 2) });
    }]);
  }
  if (other) {
    offers.push(["two noises", () => {
      page.prompt(opening);
      page.compare(true);
      page.setting(0, { model: mask.id, steps: calm(mask) });
      page.setting(1, { model: other.id, steps: calm(mask) });
    }]);
  }
  const fits = ([cells, symbols]) => model => model.dlm.grid?.symbols === symbols && model.dlm.window === cells;
  for (const puzzle of PUZZLES) {
    const solver = models.find(fits(puzzle));
    if (solver) {
      const kind = solver.dlm.grid.colours ? "a task" : solver.dlm.grid.symbols.includes("#") ? "a maze" : "a puzzle";
      offers.push([`${kind} of ${solver.dlm.grid.axes.join(" × ")}`, () => {
        page.prompt(puzzle[2]);
        page.setting(0, { model: solver.id });
      }]);
    }
  }
  root.replaceChildren("Try ", ...offers.map(([name, set]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.textContent = name;
    button.addEventListener("click", () => {
      page.compare(false);
      set();
      page.run();
    });
    return button;
  }));
  root.hidden = false;
}
