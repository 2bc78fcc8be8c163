// The X-ray panel: one answer's selections as a map, token by token, and the text of the blocks.

import { request } from "./api.js";
import { GUTTER, STRIP, TICKS, drawAxes, drawSpark } from "./axes.js";
import { BlockMap } from "./map.js";
import { element } from "./markdown.js";
import { Reader, asked } from "./reader.js";
import { Sights } from "./sights.js";

const $ = (id) => document.getElementById(id);
const MOST_HEIGHT = 440;
const MOST_ROW = 22;
const TOKENS_PER_SECOND = 12;
export const NARROW = matchMedia("(max-width: 999px)");
const number = new Intl.NumberFormat("en-US");

export class Xray {
  #map = new BlockMap($("cells"), palette());
  #recording = null;
  #reader = new Reader();
  #sights = new Sights((block) => this.#read(block));
  #context = null;
  #index = 0;
  #pointed = null;
  #row = 0;
  #block = 0;
  #frame = 0;
  #playing = 0;
  #opener = null;
  #pointers = new Map();
  #word;
  #numRows = 0;
  #numBlocks = 0;

  constructor() {
    $("xray-close").onclick = () => this.close();
    $("token").oninput = () => this.go(Number($("token").value));
    $("play").onclick = () => (this.#playing ? this.#pause() : this.#play());
    $("zoom-in").onclick = () => this.#zoom(2);
    $("zoom-out").onclick = () => this.#zoom(0.5);
    $("zoom-fit").onclick = () => this.#view(() => this.#map.fit());
    $("goto").onsubmit = (event) => {
      event.preventDefault();
      this.#read(Number($("block").value));
    };
    $("tokens").onclick = (event) => {
      if (event.target.dataset.token) this.go(Number(event.target.dataset.token));
    };
    $("top").onclick = (event) => {
      const button = event.target.closest("button");
      if (button) this.#read(Number(button.dataset.block));
    };
    $("spark").onpointerdown = (event) => this.go(Math.round((event.offsetX / $("spark").clientWidth) * this.#last));
    $("xray").onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      this.close();
    };
    this.#listen($("cells"));
    NARROW.onchange = () => this.#cover();
    new ResizeObserver(() => this.#resize()).observe($("map"));
  }

  get recording() {
    return this.#recording;
  }

  get isOpen() {
    return !$("xray").hidden;
  }

  // Show a recording; `opener` gets the focus back when the panel is closed.
  open(recording, opener) {
    this.#pause();
    this.#opener = opener ?? null;
    this.#recording = recording;
    this.#context = null;
    this.#numRows = 0;
    this.#point(null);
    this.#reader.use(recording);
    this.#sights.clear();
    this.#map.show(recording);
    $("xray").hidden = false;
    this.#cover();
    $("tokens").replaceChildren();
    this.#resize();
    this.go(this.#last);
    if (opener) $("xray-close").focus();
    if (recording.complete) this.finish();
  }

  close() {
    this.#pause();
    $("xray").hidden = true;
    this.#cover();
    this.#opener?.focus();
  }

  // The recording has grown: a view of its last token stays there.
  grow() {
    const follows = this.#index >= Number($("token").max);
    if (follows) this.go(this.#last);
    else this.#changed();
  }

  // The answer is complete: its words, and the documents of its context.
  async finish() {
    const recording = this.#recording;
    if (!recording.length) return;
    try {
      const reply = await request("/xray/context", asked(recording));
      if (recording !== this.#recording) return;
      this.#context = reply;
      this.#reader.context = reply.context;
      const words = reply.reply.map((text, index) => {
        const word = element("span", text);
        word.dataset.token = index;
        return word;
      });
      $("tokens").replaceChildren(...words);
      this.#sights.show(recording.request.messages, reply);
    } catch (error) {
      $("tokens").textContent = error.message;
    }
    this.#view(() => {});
  }

  // Show a token.
  go(index) {
    this.#index = Math.min(Math.max(0, index), this.#last);
    this.#changed();
  }

  recolor() {
    this.#map.recolor(palette());
    this.#view(() => {});
  }

  get #last() {
    return Math.max(0, (this.#recording?.length ?? 0) - 1);
  }

  // On a narrow page the panel covers everything else.
  #cover() {
    for (const node of document.querySelectorAll("header, main")) node.inert = this.isOpen && NARROW.matches;
  }

  #play() {
    if (this.#index === this.#last) this.#index = 0;
    const from = this.#index;
    const began = performance.now();
    $("play").setAttribute("aria-pressed", "true");
    $("play").setAttribute("aria-label", "Pause");
    const step = (now) => {
      this.go(from + Math.floor(((now - began) / 1000) * TOKENS_PER_SECOND));
      if (this.#index === this.#last) this.#pause();
      else this.#playing = requestAnimationFrame(step);
    };
    this.#playing = requestAnimationFrame(step);
  }

  #pause() {
    cancelAnimationFrame(this.#playing);
    this.#playing = 0;
    $("play").setAttribute("aria-pressed", "false");
    $("play").setAttribute("aria-label", "Play");
  }

  #changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.isOpen) this.#draw();
    });
  }

  #view(change) {
    change();
    this.#numBlocks = 0;
    this.#changed();
  }

  #zoom(factor, x = $("cells").clientWidth / 2) {
    this.#view(() => this.#map.zoom(factor, x));
  }

  #resize() {
    const recording = this.#recording;
    if (!recording || !this.isOpen) return;
    const rows = Math.max(1, recording.rows.length);
    const width = Math.max(60, $("map").clientWidth - GUTTER);
    const height = rows * Math.min(MOST_ROW, Math.max(2, Math.floor(MOST_HEIGHT / rows)));
    const ratio = Math.min(2, devicePixelRatio);
    $("map").style.height = `${STRIP + height + TICKS}px`;
    for (const [canvas, w, h] of [[$("cells"), width, height], [$("axes"), width + GUTTER, STRIP + height + TICKS]]) {
      canvas.style.width = `${w}px`;
      canvas.style.height = `${h}px`;
    }
    $("axes").width = (width + GUTTER) * ratio;
    $("axes").height = (STRIP + height + TICKS) * ratio;
    this.#view(() => this.#map.resize(width, height, ratio));
  }

  #draw() {
    const recording = this.#recording;
    if (!recording.length) {
      $("xray-sum").textContent = "no token yet";
      return;
    }
    if (this.#numRows !== recording.rows.length) {
      // The first token said how many rows there are.
      this.#numRows = recording.rows.length;
      this.#resize();
    }
    this.#map.draw(this.#index);
    // The axes change with the view and the length alone.
    if (this.#numBlocks !== recording.numBlocks) drawAxes($("axes"), this.#map, this.#context);
    this.#numBlocks = recording.numBlocks;
    drawSpark($("spark"), this.#map.ratio, recording.overlaps, this.#index);
    this.#describe();
    this.#tell();
    this.#mark();
    this.#sights.draw(recording.readers(this.#index), recording.rows.length, this.#reader.block);
  }

  #describe() {
    const recording = this.#recording;
    const read = recording.token(this.#index).ids.length / Math.max(1, recording.rows.length);
    const share = read / recording.numBlocks;
    const percent = share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2);
    const dense = recording.dense.length > 1 ? "dense: layers" : "dense: layer";
    $("xray-sum").textContent =
      `${round(read)} of ${number.format(recording.numBlocks)} blocks a row (${percent} %)` +
      (recording.dense.length ? ` · ${dense} ${ranges(recording.dense)}` : "");
    const slider = $("token");
    slider.max = this.#last;
    slider.value = this.#index;
    const word = this.#context?.reply[this.#index];
    slider.setAttribute("aria-valuetext", `${this.#index + 1} of ${recording.length}${word ? `, ${word}` : ""}`);
    const overlap = recording.overlaps[this.#index];
    $("overlap").textContent =
      `${number.format(this.#index + 1)} / ${number.format(recording.length)}` +
      (Number.isNaN(overlap) ? "" : ` · ${Math.round(100 * overlap)} % kept`);
    $("cells").setAttribute(
      "aria-label",
      `Map of ${recording.rows.length} rows and ${recording.numBlocks} blocks at token ${this.#index + 1}`,
    );
    $("block").max = recording.numBlocks - 1;
    this.#underline($("tokens").children[this.#index]);
    this.#listTop();
  }

  #underline(word) {
    if (this.#word === word) return;
    this.#word?.removeAttribute("aria-current");
    this.#word = word;
    word?.setAttribute("aria-current", "true");
    if (word) scrolled($("tokens"), word);
  }

  #listTop() {
    const found = this.#recording.top(this.#index, 5);
    const buttons = $("top").children;
    while (buttons.length < found.length) $("top").append(Object.assign(element("button"), { type: "button" }));
    while (buttons.length > found.length) buttons[buttons.length - 1].remove();
    found.forEach(([block, rows], i) => {
      buttons[i].textContent = number.format(block);
      buttons[i].dataset.block = block;
      buttons[i].title = `Block ${number.format(block)}: read by ${rows} of ${this.#recording.rows.length} rows`;
      buttons[i].setAttribute("aria-label", buttons[i].title);
    });
  }

  #listen(cells) {
    cells.onpointermove = (event) => {
      const held = this.#pointers.get(event.pointerId);
      if (!held) return this.#point(this.#map.at(event.offsetX, event.offsetY));
      const before = this.#spread();
      const moved = held.x - event.offsetX;
      this.#pointers.set(event.pointerId, { ...held, x: event.offsetX, moved: held.moved + Math.abs(moved) });
      const after = this.#spread();
      if (before && after) this.#zoom(after.width / Math.max(1, before.width), after.middle);
      else this.#view(() => this.#map.move(this.#map.first + (moved * this.#map.ratio) / this.#map.scale));
    };
    cells.onpointerdown = (event) => {
      cells.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, { x: event.offsetX, moved: 0 });
    };
    cells.onpointerup = cells.onpointercancel = (event) => {
      const held = this.#pointers.get(event.pointerId);
      this.#pointers.delete(event.pointerId);
      const found = this.#map.at(event.offsetX, event.offsetY);
      if (event.type === "pointerup" && held?.moved < 4 && found) {
        this.#point(found);
        this.#read(found.block);
      }
    };
    cells.onpointerleave = () => this.#point(null);
    cells.addEventListener("wheel", (event) => {
      event.preventDefault();
      const sideways = event.shiftKey ? event.deltaY : event.deltaX;
      if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
        this.#view(() => this.#map.move(this.#map.first + (sideways * this.#map.ratio) / this.#map.scale));
      } else {
        this.#zoom(Math.exp(-event.deltaY / 250), event.offsetX);
      }
    });
    cells.onkeydown = (event) => this.#key(event);
  }

  // Distance and middle of two fingers.
  #spread() {
    if (this.#pointers.size !== 2) return null;
    const [a, b] = [...this.#pointers.values()].map(({ x }) => x);
    return { width: Math.abs(a - b), middle: (a + b) / 2 };
  }

  #key(event) {
    const far = event.shiftKey ? 16 : 1;
    const steps = { ArrowLeft: [0, -far], ArrowRight: [0, far], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const zooms = { "+": 2, "=": 2, "-": 0.5, _: 0.5 };
    if (steps[event.key]) this.#step(...steps[event.key]);
    else if (zooms[event.key]) this.#zoom(zooms[event.key], this.#map.place(this.#block).x);
    else if (event.key === "0") this.#view(() => this.#map.fit());
    else if (event.key === "Enter") this.#read(this.#block);
    else return;
    event.preventDefault();
  }

  #step(rows, blocks) {
    const { rows: all, numBlocks } = this.#recording;
    const row = Math.min(Math.max(0, this.#row + rows), all.length - 1);
    const block = Math.min(Math.max(0, this.#block + blocks), numBlocks - 1);
    this.#reveal(block);
    this.#point({ row, block });
  }

  #reveal(block) {
    const { first, span } = this.#map;
    if (block < first || block + 1 > first + span) this.#view(() => this.#map.move(block + 0.5 - span / 2));
  }

  #point(found) {
    this.#pointed = found;
    if (found) [this.#row, this.#block] = [found.row, found.block];
    this.#tell();
  }

  // What is pointed at: it changes with the token, and its place with the view.
  #tell() {
    const found = this.#pointed;
    $("line").hidden = !found;
    if (!found) {
      $("hover").textContent = "";
      return;
    }
    const { layer, group } = this.#recording.rows[found.row];
    const times = this.#recording.count(found.row, found.block);
    $("hover").textContent =
      `block ${number.format(found.block)} · layer ${layer}, group ${group} · ` +
      `${this.#state(found)} · read by ${number.format(times)} of ${number.format(this.#recording.length)} tokens`;
    const height = this.#map.rowHeight / this.#map.ratio;
    const { x, width } = this.#map.place(found.block);
    Object.assign($("line").style, {
      left: `${GUTTER + x}px`,
      top: `${STRIP + found.row * height}px`,
      width: `${Math.max(2, width)}px`,
      height: `${Math.max(2, height)}px`,
    });
  }

  #state({ row, block }) {
    const reads = (index) => {
      const token = this.#recording.token(index);
      return token.ids.subarray(token.starts[row], token.starts[row + 1]).includes(block);
    };
    if (!reads(this.#index)) return "not read";
    return this.#index > 0 && reads(this.#index - 1) ? "kept" : "new";
  }

  // A line through all rows at the block that is being read.
  #mark() {
    const column = $("column");
    const place = this.#reader.block === null ? null : this.#map.place(this.#reader.block);
    column.hidden = !place || place.x + place.width < 0 || place.x > $("cells").clientWidth;
    if (column.hidden) return;
    column.style.left = `${GUTTER + place.x}px`;
    column.style.width = `${Math.max(2, place.width)}px`;
    column.style.height = `${$("cells").clientHeight}px`;
  }

  #read(block) {
    $("block").value = block;
    this.#reader.read(block);
    this.#reveal(block);
    this.#changed();
  }
}

// The swatches of the legend are the colours, whatever the theme makes of them.
function palette() {
  const color = (id) => {
    const [r, g, b] = getComputedStyle($(id)).backgroundColor.match(/[\d.]+/g).map(Number);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  };
  const ever = ["c-ever-1", "c-ever-2", "c-ever-3"].map(color);
  return { fresh: color("c-new"), kept: color("c-kept"), ever, even: color("c-even"), odd: color("c-odd") };
}

function ranges(layers) {
  const last = layers.at(-1);
  return layers.length > 2 && last - layers[0] === layers.length - 1 ? `${layers[0]}-${last}` : layers.join(", ");
}

function round(value) {
  return value >= 10 || Number.isInteger(value) ? Math.round(value) : value.toFixed(1);
}

// Scrolls the box alone, never the page.
function scrolled(box, child) {
  const top = child.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + child.offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = top - box.clientHeight / 2;
  }
}
