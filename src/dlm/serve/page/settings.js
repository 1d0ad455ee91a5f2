// The pickers of one setting. A model has one noise: picking another noise picks the model of that noise.

const NONE = "none"; // an autoregressive model writes from left to right
const noiseOf = model => model.dlm.noise || NONE;
const kin = (a, b) => { // how alike two names are: letters shared from the start
  let n = 0;
  while (n < a.length && a[n] === b[n]) n++;
  return n;
};

function fill(select, rows, value) { // rows: [value, text]
  select.replaceChildren(...rows.map(([name, text]) => {
    const option = document.createElement("option");
    option.value = name;
    option.textContent = text;
    return option;
  }));
  if (rows.some(([name]) => name === value)) select.value = value;
}

export class Settings {
  constructor(models, title, changed) {
    this.models = models;
    this.changed = changed;
    this.root = document.getElementById("setting").content.cloneNode(true).firstElementChild;
    this.root.setAttribute("aria-label", `Setting ${title}`);
    this.root.querySelector(".letter").textContent = title;
    this.field = name => this.root.querySelector(`[name="${name}"]`);
    fill(this.field("model"), models.map(model => [model.id, model.id]), models[0]?.id);
    this.field("model").addEventListener("change", () => this.update());
    this.field("noise").addEventListener("change", () => this.pickNoise(this.field("noise").value));
    this.field("sampler").addEventListener("change", () => this.update(false));
    this.root.addEventListener("input", () => this.changed());
    this.update();
  }

  get model() { return this.models.find(model => model.id === this.field("model").value); }

  pickNoise(noise) {
    const now = this.model, fitting = this.models.filter(model => noiseOf(model) === noise);
    fitting.sort((a, b) => kin(b.id, now.id) - kin(a.id, now.id) || a.id.length - b.id.length);
    if (fitting.length) this.field("model").value = fitting[0].id;
    this.update();
  }

  update(fresh = true) {
    const model = this.model;
    if (!model) return;
    if (fresh) {
      const noises = [...new Set(this.models.map(noiseOf))], before = this.field("sampler").value;
      fill(this.field("noise"), noises.map(noise => [noise, noise]), noiseOf(model));
      const names = model.dlm.samplers.map(sampler => [sampler.name, sampler.name]);
      const usual = model.dlm.grid && names.some(([name]) => name === "margin") ? "margin" : model.dlm.default_sampler; // of a puzzle the surest cell first
      const kept = names.some(([name]) => name === before) && Boolean(model.dlm.grid) === this.cells ? before : usual;
      this.cells = Boolean(model.dlm.grid);
      this.field("temperature").placeholder = this.cells ? "0" : model.dlm.temperature ?? "usual";
      this.field("length").placeholder = model.dlm.length ?? "usual";
      this.field("length").disabled = this.cells;
      fill(this.field("sampler"), names, kept);
      this.field("steps").placeholder = model.dlm.kind === "autoregressive" ? "–" : model.dlm.steps ?? "usual";
      this.field("steps").disabled = model.dlm.kind === "autoregressive";
    }
    const sampler = model.dlm.samplers.find(one => one.name === this.field("sampler").value);
    const about = this.root.querySelector(".about");
    about.textContent = about.title = sampler?.about || "";
    this.changed();
  }

  // The fields of a request. Empty ones are left to the server.
  get value() {
    const value = { model: this.field("model").value, sampler: this.field("sampler").value };
    for (const name of ["steps", "temperature", "length", "seed"]) {
      const field = this.field(name);
      if (field.value !== "" && !field.disabled) value[name] = Number(field.value);
    }
    return value;
  }

  set value(value) {
    if (this.models.some(model => model.id === value.model)) this.field("model").value = value.model;
    this.update();
    const sampler = this.field("sampler");
    if (value.sampler) {
      if (![...sampler.options].some(option => option.value === value.sampler)) sampler.add(new Option(value.sampler, value.sampler));
      sampler.value = value.sampler;
    }
    for (const name of ["steps", "temperature", "length", "seed"]) this.field(name).value = value[name] ?? "";
    this.update(false);
  }

  get wrong() { // the first field that cannot be sent, as one line
    for (const field of this.root.querySelectorAll("input")) {
      if (!field.checkValidity()) {
        field.focus();
        return `${field.closest("label").firstChild.textContent}: ${field.validationMessage}`;
      }
    }
    return "";
  }

  get digest() {
    const { model, sampler, steps } = this.value;
    return [model, sampler, steps ? `${steps} steps` : ""].filter(Boolean).join(" · ");
  }

  other() { // another setting worth comparing: another noise if there is one, else half the steps
    const noises = [...this.field("noise").options].map(option => option.value);
    const here = this.field("noise").value, now = this.value;
    const rest = noises.filter(name => name !== here && name !== NONE);
    const noise = rest.includes("uniform") ? "uniform" : rest[0];
    return { noise, value: noise ? now : { ...now, steps: Math.max(1, Math.round((now.steps ?? this.model.dlm.steps ?? 64) / 4)) } };
  }
}
