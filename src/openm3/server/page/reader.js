// The text of one block, with its document and lines.

import { request } from "./api.js";

const number = new Intl.NumberFormat("en-US");
const $ = (id) => document.getElementById(id);

// What the server makes a recording's context of.
export function asked({ request: { messages, thinking }, ids }) {
  return { messages, thinking, reply: ids };
}

export class Reader {
  // The name that the server gave the context, and the block that is shown.
  context = null;
  block = null;
  #recording = null;
  #known = new Map();

  use(recording) {
    this.#recording = recording;
    this.context = null;
    this.block = null;
    this.#known.clear();
    $("reader").hidden = true;
  }

  async read(block) {
    const recording = this.#recording;
    this.block = block;
    let title;
    let reply = this.#known.get(block);
    try {
      reply ??= await this.#fetched(recording, block);
      title = titled(reply);
    } catch (error) {
      title = error.message;
    }
    if (recording !== this.#recording || this.block !== block) return;
    // While an answer is being written, its last block grows.
    if (reply && recording.complete) this.#known.set(block, reply);
    $("reader").hidden = false;
    $("reader-title").textContent = title;
    // Of pictures and videos there is no text, only a placeholder a token.
    const cells = (run, kind) => `[${number.format(run.split("]<]").length - 1)} tokens of ${kind}]`;
    $("reader-text").textContent = (reply?.text ?? "").replace(/(?:\]<\](image|video)\[>\[)+/g, cells);
    $("reader-text").scrollTop = 0;
  }

  // By the context's name; with the whole conversation where the server has forgotten it.
  async #fetched(recording, block) {
    if (this.context) {
      try {
        return await request("/xray/block", { context: this.context, block });
      } catch (error) {
        if (error.status !== 404) throw error;
      }
    }
    return request("/xray/block", { ...asked(recording), block });
  }
}

function titled({ block, tokens, places }) {
  const where = new Set(places.map(placed));
  const range = `tokens ${number.format(tokens[0])} to ${number.format(tokens[1] - 1)}`;
  return [`Block ${number.format(block)}`, [...where].join(", "), range].filter(Boolean).join(" · ");
}

// Whose text it is: file and lines, as editors and compilers write them.
export function placed({ role, source, lines }) {
  if (!source) return { system: "system message", user: "message", assistant: "answer" }[role] ?? role;
  if (!lines) return source;
  return lines[1] > lines[0] ? `${source}:${lines[0]}-${lines[1]}` : `${source}:${lines[0]}`;
}
