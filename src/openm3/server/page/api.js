// Requests to this server, with the API key where there is one.

const KEY = "openm3.key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function getKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// A GET without a body, else a POST of JSON or of a form. Throws ApiError with what the server says.
async function fetched(path, body, signal) {
  const headers = {};
  const isForm = body instanceof FormData;
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (body && !isForm) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, body: body && !isForm ? JSON.stringify(body) : body });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const reply = await response.json().catch(() => null);
  throw new ApiError(reply?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

export async function request(path, body, signal) {
  return (await fetched(path, body, signal)).json();
}

// Have the server keep a file; the id that messages name it by.
export async function upload(file) {
  const form = new FormData();
  form.append("purpose", "vision");
  form.append("file", file);
  return (await request("/v1/files", form)).id;
}

// The chunks of a streamed chat completion.
export async function* chat(body, signal) {
  const response = await fetched("/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, 500);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
