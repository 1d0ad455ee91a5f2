// Talking to the server: JSON, server-sent events, the API key.

const KEY = "dlm-api-key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  try { sessionStorage.setItem(KEY, key); } catch { /* storage may be switched off; the key then lasts for one request */ }
  memory = key;
}
let memory = "";

function headers(more = {}) {
  let key = memory;
  try { key = sessionStorage.getItem(KEY) || memory; } catch { /* as above */ }
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function request(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is dlm serve still running?", 0);
  }
  if (reply.ok) return reply;
  let message = `The server answered ${reply.status}.`;
  try {
    const body = await reply.json();
    message = body.error?.message || message;
  } catch { /* not JSON: the status has to do */ }
  const wait = reply.status === 429 && reply.headers.get("Retry-After");
  throw new ApiError(wait ? `${message} Try again in ${wait} s.` : message, reply.status);
}

export async function models() {
  const reply = await request("v1/models", { headers: headers() });
  return (await reply.json()).data.filter(model => model.dlm);
}

const post = (path, body, signal) =>
  request(path, { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal });

export async function file(format, traces) {
  return (await post("v1/dlm/export", { format, traces })).blob();
}

// Yields [event, data] until the stream ends; ends early with an error when the signal aborts.
export async function* events(body, signal) {
  const reply = await post("v1/dlm/generate", body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        let name = "message", data = "";
        for (const line of block.split(/\r?\n/)) {
          if (line.startsWith("event:")) name = line.slice(6).trim();
          else if (line.startsWith("data:")) data += line.slice(5).trimStart();
        }
        if (data && data !== "[DONE]") yield [name, JSON.parse(data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
