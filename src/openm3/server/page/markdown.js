// Markdown into elements as it streams in. Text goes in as text nodes only, so nothing a model writes can be markup.

// Shows a text that grows: blocks that are finished stay as they are, only the last one is made anew.
export class Markdown {
  #element;
  #tail = "";
  #open = [];

  constructor(element) {
    this.#element = element;
  }

  append(text) {
    this.#tail += text;
    for (const node of this.#open) node.remove();
    const found = blocks(this.#tail);
    for (const source of found.slice(0, -1)) this.#element.append(...rendered(source));
    this.#tail = found.at(-1) ?? "";
    this.#open = rendered(this.#tail);
    this.#element.append(...this.#open);
  }
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const IN_LIST = /^ *([-*+]|\d{1,9}[.)])\s/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;

// Sources of the top-level blocks: parted by empty lines outside of fences and lists. Joined, they are the text.
function blocks(text) {
  const found = [];
  let current = "";
  let fence = null;
  let ended = false;
  for (const line of text.match(/[^\n]*\n|[^\n]+$/g) ?? []) {
    const bare = line.trimEnd();
    const continues = IN_LIST.test(current) && (ITEM.test(bare) || /^ {2,}\S/.test(bare));
    if (ended && bare && !fence && !continues) {
      found.push(current);
      current = "";
    }
    if (bare) ended = false;
    const mark = FENCE.exec(bare)?.[1];
    if (fence) {
      if (mark && mark[0] === fence[0] && mark.length >= fence.length && bare.trim() === mark) {
        fence = null;
        ended = true;
      }
    } else if (mark) {
      fence = mark;
    } else if (!bare || /^#{1,6}\s/.test(bare)) {
      ended = true;
    }
    current += line;
  }
  if (current) found.push(current);
  return found;
}

function rendered(source) {
  const nodes = [];
  const lines = source.replace(/\s+$/, "").split("\n");
  while (lines.length) {
    if (!lines[0].trim()) lines.shift();
    else nodes.push(block(lines));
  }
  return nodes;
}

// Takes the lines of one element from the front.
function block(lines) {
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence);
  const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(lines[0]);
  if (heading) {
    lines.shift();
    // The page's own headings are above: an answer's begin at h3.
    return element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2]));
  }
  if (RULE.test(lines[0])) {
    lines.shift();
    return element("hr");
  }
  if (ITEM.test(lines[0])) return list(lines);
  if (/^ {0,3}>/.test(lines[0])) {
    const inside = taken(lines, (line) => /^ {0,3}>/.test(line)).map((line) => line.replace(/^ {0,3}> ?/, ""));
    return element("blockquote", ...rendered(inside.join("\n")));
  }
  if (lines[0].includes("|") && TABLE_RULE.test(lines[1] ?? "")) return table(lines);
  const first = lines.shift();
  const text = [first, ...taken(lines, (line) => line.trim() && !starts(line))].join("\n");
  return element("p", ...inline(text));
}

function starts(line) {
  return FENCE.test(line) || /^#{1,6}\s/.test(line) || RULE.test(line) || ITEM.test(line) || /^ {0,3}>/.test(line);
}

function taken(lines, wanted) {
  const found = [];
  while (lines.length && wanted(lines[0])) found.push(lines.shift());
  return found;
}

function code(lines, [, mark, language]) {
  lines.shift();
  const inside = taken(lines, (line) => !(line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "")));
  lines.shift();
  const pre = element("pre", element("code", inside.join("\n")));
  pre.tabIndex = 0;
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  return pre;
}

function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(mark, 10);
  for (;;) {
    const item = lines.length && ITEM.exec(lines[0]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== ordered) return node;
    lines.shift();
    const inside = taken(lines, (line) => !line.trim() || line.search(/\S/) > indent.length);
    const cut = Math.min(...inside.filter((line) => line.trim()).map((line) => line.search(/\S/)));
    const text = element("span", ...inline(item[3]));
    node.append(element("li", text, ...rendered(inside.map((line) => line.slice(cut)).join("\n"))));
  }
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, tag) => element("tr", ...cells(line).map((text) => element(tag, ...inline(text.trim()))));
  const head = element("thead", row(lines.shift(), "th"));
  lines.shift();
  const body = element("tbody", ...taken(lines, (line) => line.includes("|")).map((line) => row(line, "td")));
  const scroll = element("div", element("table", head, body));
  scroll.className = "scroll";
  return scroll;
}

// Lengths are limited: without an end, each mark would be looked for to the end of the text.
const INLINE = new RegExp(
  [
    /(`+)(.{1,2000}?)\1(?!`)/,
    /\*\*(?=\S)(.{0,2000}?\S)\*\*/,
    /\b__(?=\S)(.{0,2000}?\S)__\b/,
    /\*(?=[^\s*])(.{0,2000}?[^\s*])\*/,
    /\[([^\]\n]{1,500})\]\(([^()\s]{1,2000}(?:\([^()\s]{0,500}\)[^()\s]{0,500})?)\)/,
    /\\([\\`*_{}[\]()#+.!|<>~-])/,
    /( {2,}|\\)\n/,
  ].map((part) => part.source).join("|"),
  "gs",
);

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, , verbatim, strong, strong2, weak, label, target, escaped, broken] = match;
    nodes.push(text.slice(end, match.index));
    end = match.index + whole.length;
    if (verbatim !== undefined) nodes.push(element("code", verbatim.replace(/^ (.*\S.*) $/s, "$1")));
    else if (strong ?? strong2) nodes.push(element("strong", ...inline(strong ?? strong2)));
    else if (weak) nodes.push(element("em", ...inline(weak)));
    else if (label) nodes.push(link(label, target, whole));
    else if (escaped) nodes.push(escaped);
    else if (broken) nodes.push(element("br"));
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

// Only addresses that open a page or a letter: no script, no data.
function link(label, target, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return whole;
  const node = element("a", ...inline(label));
  node.href = target;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  return node;
}

export function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
