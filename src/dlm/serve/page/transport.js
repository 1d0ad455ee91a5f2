// The playhead over one run, by its steps, or over two, by the forward passes that both have made.

const REST_SECONDS = 0.6; // the end is shown so long before play stops
const PLAY = "M3 1.5v13l11-6.5z", PAUSE = "M3 2h4v12H3zM9 2h4v12H9z";
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Transport {
  constructor(draw) {
    this.draw = draw;
    this.traces = [];
    this.at = 0;
    this.playing = this.live = false;
    this.held = 0;
    this.$ = id => document.getElementById(id);
    this.$("play").addEventListener("click", () => this.play(!this.playing));
    this.$("at").addEventListener("input", () => { this.pause(); this.go(Number(this.$("at").value)); });
    this.icon();
  }

  get shared() { return this.traces.length > 1; }
  when(trace, k) { return this.shared ? trace.passes[k] : k; }
  frame(trace) { return this.shared ? trace.frameOfPasses(this.at) : Math.min(trace.last, Math.floor(this.at + 1e-9)); }
  get max() { return Math.max(0, ...this.traces.map(trace => this.when(trace, trace.last))); }

  // As far as every run has come, so that none is ahead in forward passes; a run that is over does not wait.
  get reached() {
    const going = this.traces.filter(trace => !trace.over);
    return going.length ? Math.min(...going.map(trace => this.when(trace, trace.last))) : this.max;
  }

  get rest() { return !this.playing && !this.live && this.at >= this.max && this.traces.every(trace => trace.over); }

  get planned() { // length of the axis, an estimate until the end
    if (this.traces.every(trace => trace.over)) return this.max;
    return Math.max(1, this.max, ...this.traces.map(trace => trace.over ? 0 : trace.planned || trace.holes));
  }

  get duration() { return Math.min(12, Math.max(4, this.planned / 20)); } // seconds of a whole run at speed 1

  follow(traces) {
    this.traces = traces;
    this.live = true;
    this.icon();
    this.at = 0;
    this.start();
  }

  add(traces) { // more has come
    this.traces = traces;
    if (this.live) this.start();
  }

  start() {
    if (this.ticking) return;
    this.ticking = true;
    this.before = performance.now();
    requestAnimationFrame(now => this.tick(now));
  }

  tick(now) {
    const passed = Math.min(0.25, Math.max(0, now - this.before) / 1000);
    this.before = now;
    const speed = Number(this.$("speed").value) * this.planned / this.duration, ended = this.traces.every(trace => trace.over);
    if (this.live) {
      this.at = still.matches ? this.reached : Math.min(this.reached, this.at + passed * speed);
      this.held = ended && this.at >= this.max ? this.held + passed : 0;
      if (ended && (this.held >= REST_SECONDS || still.matches)) { this.pause(); this.at = this.max; this.ended?.(); }
    } else if (this.playing) {
      this.at += passed * speed;
      if (this.at >= this.max + REST_SECONDS * speed) { this.at = this.max; this.pause(); }
    }
    this.draw(true);
    this.ticking = this.live || this.playing;
    if (this.ticking) requestAnimationFrame(next => this.tick(next));
  }

  play(on) {
    if (!this.traces.length) return;
    if (this.live) { // while it is written, pause holds the picture; the stream goes on
      this.live = false;
      this.playing = false;
    } else {
      if (on && this.at >= this.max) {
        if (this.traces.every(trace => trace.over)) this.at = 0;
        else this.live = true;
      }
      this.playing = on && !this.live;
      if (on) this.start();
    }
    this.icon();
    this.draw();
  }

  pause() { this.playing = this.live = false; this.icon(); }

  go(x) {
    this.at = Math.max(0, Math.min(this.max, x));
    this.draw();
  }

  jump(direction) {
    this.pause();
    const x = Math.min(this.at, this.max);
    let best = direction > 0 ? this.max : 0;
    for (const trace of this.traces) {
      for (let k = 0; k <= trace.last; k++) {
        const at = this.when(trace, k);
        if (direction > 0 ? at > x + 1e-6 && at < best : at < x - 1e-6 && at > best) best = at;
      }
    }
    this.go(best);
  }

  icon() {
    const on = this.playing || this.live;
    this.$("play").querySelector("path").setAttribute("d", on ? PAUSE : PLAY);
    this.$("play").setAttribute("aria-label", on ? "Pause" : "Play");
  }

  // The scrubber: its value, its clock, and the changes of every forward pass as a small skyline behind it.
  show(words) {
    const range = this.$("at"), planned = this.planned || 1;
    range.disabled = this.$("play").disabled = !this.traces.length || this.max === 0;
    range.max = planned;
    range.value = this.at;
    range.setAttribute("aria-valuetext", words || "nothing yet");
    const [first] = this.traces, passes = this.shared ? Math.floor(Math.min(this.at, this.max) + 1e-9) : first?.passes[this.frame(first)];
    const all = this.shared ? planned : first?.over ? first.passes[first.last] : first?.planned || first?.holes;
    this.$("clock").textContent = first ? `${passes} / ${all}` : "\u00a0";
    const key = `${this.traces.map(trace => trace.last)} ${planned} ${Math.floor(150 * this.at / planned)}`;
    if (key === this.drawn) return;
    this.drawn = key;
    this.$("pulse").querySelector(".all").setAttribute("d", this.skyline(planned, Infinity));
    this.$("pulse").querySelector(".done").setAttribute("d", this.skyline(planned, this.at));
  }

  // Bars of the changes of every forward pass; of two runs one stands up and the other hangs down.
  skyline(planned, upto) {
    const bins = Math.min(120, planned), wide = 100 / bins, two = this.shared, ground = two ? 11 : 20;
    return this.traces.map((trace, j) => {
      const sums = Array(bins).fill(0);
      for (let k = 1; k <= trace.last; k++) sums[Math.min(bins - 1, Math.floor((this.when(trace, k) - 1) / planned * bins))] += trace.moved[k];
      const most = Math.sqrt(Math.max(1, ...sums)), room = two ? 8 : 18;
      return sums.map((sum, i) => {
        const high = (1 + room * Math.sqrt(sum) / most) * (j ? 1 : -1);
        const from = ground + (two ? (j ? 0.5 : -0.5) : 0);
        return sum && i / bins * planned < upto ? `M${(i * wide).toFixed(2)} ${from}v${high.toFixed(2)}h${(wide * 0.72).toFixed(2)}V${from}z` : "";
      }).join("");
    }).join("");
  }
}
