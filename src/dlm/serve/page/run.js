// One request under way in one pane.

import * as editor from "./editor.js";
import { ApiError, events } from "./stream.js";
import { Trace } from "./trace.js";

// Streams into the pane; `tell` is called after every event. Resolves to the trace, also when it was stopped.
// own: the parts of the request's canvas that the user locked
export async function run(pane, request, model, signal, tell, own = new Set()) {
  let trace = null;
  try {
    for await (const [name, data] of events(request, signal)) {
      if (name === "begin") {
        trace = new Trace(data, model.dlm.kind === "diffusion" ? data.steps ?? model.dlm.steps : 0);
        const look = { characters: model.dlm.characters, drafting: model.dlm.kind === "autoregressive" };
        pane.model = model;
        if (request.canvas) pane.show(trace, look, editor.places(request.canvas, data), editor.places(request.canvas, data, own));
        else pane.show(trace, look, editor.given(data));
      } else if (name === "step") trace?.add(data);
      else if (name === "end") { trace.end = data; }
      else if (name === "error") throw new ApiError(data.error?.message || "The run broke off.", 500);
      if (trace) tell(trace);
    }
    if (trace && !trace.end) throw new ApiError("The connection broke off before the text was done.", 0);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    if (trace) { trace.over = true; tell(trace); }
  }
  return trace;
}
