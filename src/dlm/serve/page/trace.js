// A run as its events tell it: every position at every step, and the counts.

export const last = (sorted, x) => { // index of the last entry <= x, -1 if none
  let low = 0, high = sorted.length;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (sorted[mid] <= x) low = mid + 1; else high = mid;
  }
  return low - 1;
};

const settles = state => state === "f" || state === "c";

export class Trace {
  // planned: forward passes that it may take, 0 if unknown
  constructor(begin, planned = 0) {
    this.planned = planned;
    this.begin = begin;
    this.steps = [];
    this.end = null;
    this.over = false; // ended, stopped or broken off
    this.born = performance.now();
    this.length = begin.tokens.length;
    this.history = begin.tokens.map(([id, text], i) => {
      const state = begin.states[i];
      return { frames: [0], entries: [{ id, text, state, confidence: null, alternatives: null, mask: state === "n" && id === begin.mask_id }] };
    });
    this.holes = [...begin.states].filter(state => state !== "g").length;
    this.passes = [0]; // forward passes by frame
    this.settled = [0]; // settled positions by frame
    this.moved = [0]; // changes by frame
    this.seconds = [0];
    this.blends = [new Map()]; // [text, share] of the likeliest tokens by position, by frame
  }

  add(step) {
    const k = this.steps.push(step);
    step.seconds ??= Math.round(performance.now() - this.born) / 1000;
    let settled = this.settled[k - 1];
    for (const [i, id, text, state, confidence, alternatives] of step.changed) {
      const { frames, entries } = this.history[i];
      settled += settles(state) - settles(entries.at(-1).state);
      const entry = { id, text, state, confidence, alternatives, mask: state === "n" && id === this.begin.mask_id };
      if (entries.at(-1).state === "x" && this.steps[frames.at(-1) - 1].forwards === step.forwards) entry.struck = entries.at(-1).text;
      if (frames.at(-1) === k) entries[entries.length - 1] = entry;
      else { frames.push(k); entries.push(entry); }
    }
    this.passes.push(Math.max(this.passes[k - 1], step.forwards));
    this.settled.push(settled);
    this.moved.push(step.changed.length);
    this.seconds.push(step.seconds);
    this.blends.push(new Map(step.blends));
  }

  get last() { return this.steps.length; }

  at(i, k) { // entry of position i at frame k, with its frame and its state then
    const { frames, entries } = this.history[i];
    const j = Math.max(0, last(frames, k)), entry = entries[j];
    const state = entry.state === "f" && k > frames[j] ? "c" : entry.state;
    return { ...entry, state, frame: frames[j], change: j, changes: frames.length - 1, blend: this.blends[k]?.get(i) };
  }

  final(i) { return this.history[i].entries.at(-1); }

  frameOfPasses(passes) { return Math.max(0, last(this.passes, passes + 1e-9)); }

  text(k = this.last) {
    let all = "";
    for (let i = 0; i < this.length; i++) {
      const { text, mask } = this.at(i, k);
      all += mask ? "" : text;
    }
    return all;
  }

  record(label) {
    return { label, begin: this.begin, steps: this.steps, ...(this.end ? { end: this.end } : {}) };
  }
}
