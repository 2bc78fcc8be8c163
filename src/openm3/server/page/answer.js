// One answer on the page, as it comes: thinking, text, evidence, cost.

import { Markdown, element } from "./markdown.js";
import { view } from "./media.js";
import { placed } from "./reader.js";

const number = new Intl.NumberFormat("en-US");
const rounded = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

export class Answer {
  thinking = "";
  content = "";
  failed = false;
  #began = performance.now();
  #first = null;
  #last = null;
  #thought = null;
  #pending = { thinking: "", content: "" };
  #frame = 0;
  #onGrow;

  // `onGrow` is called after more has been shown.
  constructor(onGrow) {
    this.#onGrow = onGrow;
    this.element = element("article");
    this.element.className = "answer";
    this.element.setAttribute("aria-label", "Answer");
    this.thoughts = element("div");
    this.details = element("details", element("summary", "Thinking…"), this.thoughts);
    this.details.className = "thinking";
    this.details.hidden = true;
    this.text = element("div");
    this.text.className = "text";
    this.foot = element("footer", element("span", "Reading…"));
    this.element.append(this.details, this.text, this.foot);
    this.markdown = new Markdown(this.text);
  }

  // Add a delta's texts.
  add({ reasoning_content: thinking, content }) {
    if (!thinking && !content) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.thinking += thinking ?? "";
    this.content += content ?? "";
    this.#pending.thinking += thinking ?? "";
    this.#pending.content += content ?? "";
    if (content && this.thinking) this.#thought ??= this.#last;
    this.#frame ||= requestAnimationFrame(() => this.#show());
  }

  // Show what is left and what it cost. `reason` is the protocol's, or "abort" where the reader stopped it.
  finish({ reason, usage, evidence }) {
    cancelAnimationFrame(this.#frame);
    this.#show();
    if (this.thinking) this.details.firstChild.textContent = `Thought for ${seconds(this.#thinkingSeconds)}`;
    if (evidence?.length) this.text.after(evidenceList(evidence));
    this.foot.replaceChildren(element("span", [...this.#cost(usage), ENDS[reason]].filter(Boolean).join(" · ")));
    this.#onGrow();
  }

  fail(message) {
    this.failed = true;
    cancelAnimationFrame(this.#frame);
    this.#show();
    const alert = element("p", message);
    alert.className = "error";
    alert.setAttribute("role", "alert");
    this.foot.replaceChildren(alert);
    this.#onGrow();
  }

  // What to send back with the next question, null where nothing was written.
  get message() {
    if (!this.content && !this.thinking) return null;
    const message = { role: "assistant", content: this.content };
    return this.thinking ? { ...message, reasoning_content: this.thinking } : message;
  }

  get #thinkingSeconds() {
    return ((this.#thought ?? this.#last) - this.#first) / 1000;
  }

  #show() {
    this.#frame = 0;
    const { thinking, content } = this.#pending;
    this.#pending = { thinking: "", content: "" };
    if (thinking) {
      this.details.hidden = false;
      this.thoughts.append(thinking);
      this.details.firstChild.textContent = `Thinking… ${seconds(this.#thinkingSeconds)}`;
    }
    if (content) this.markdown.append(content);
    if (this.#first) this.foot.firstChild.textContent = "Answering…";
    this.#onGrow();
  }

  #cost(usage) {
    if (!this.#first) return [];
    const first = `first after ${seconds((this.#first - this.#began) / 1000)}`;
    if (!usage) return [first];
    const { prompt_tokens: read, completion_tokens: written } = usage;
    const cached = usage.prompt_tokens_details?.cached_tokens;
    // The first token came with the prompt.
    const rate = (written - 1) / ((this.#last - this.#first) / 1000);
    return [
      `${number.format(written)} tokens${Number.isFinite(rate) && rate > 0 ? ` at ${rounded.format(rate)}/s` : ""}`,
      first,
      `context ${number.format(read)}${cached ? `, ${number.format(cached)} cached` : ""}`,
    ];
  }
}

const ENDS = {
  length: "cut at the token limit",
  abort: "stopped",
  timeout: "out of time",
  content_filter: "filtered",
};

function seconds(value) {
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} s`;
}

// The lines that an answer draws on, most attended first.
function evidenceList(evidence) {
  const items = evidence.map(({ text, share, source, lines }) => {
    const where = placed({ role: "user", source, lines });
    const label = element("div", element("b", where), ` ${Math.round(100 * share)} % of the attention`);
    const quote = element("pre", text);
    quote.tabIndex = 0;
    quote.setAttribute("aria-label", where);
    return element("li", label, quote);
  });
  const count = `${items.length} passage${items.length > 1 ? "s" : ""}`;
  const details = element("details", element("summary", `Drawn from ${count}`), element("ol", ...items));
  details.className = "evidence";
  return details;
}

// A message as its writer sent it: pictures and videos, the documents by name, then the text.
export function question(documents, text, media = []) {
  const node = element("article", element("p", text));
  node.className = "question";
  node.setAttribute("aria-label", "You");
  if (documents.length) {
    const names = element("ul", ...documents.map(({ name }) => element("li", name)));
    names.setAttribute("aria-label", "Documents");
    node.prepend(names);
  }
  if (media.length) {
    const views = element("div", ...media.map((item) => view(item, item.name)));
    views.className = "views";
    node.prepend(views);
  }
  return node;
}
