// The pictures and videos of a context, and over them the cells that a token of the answer read.

import { element } from "./markdown.js";
import { shownIn, view } from "./media.js";

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-US");
const VEIL = "rgba(10, 14, 20, 0.66)";

export class Sights {
  #sights = [];
  #onBlock;

  // `onBlock` is called with the block of a cell that was clicked.
  constructor(onBlock) {
    this.#onBlock = onBlock;
  }

  clear() {
    this.#sights = [];
    $("sights").replaceChildren();
    $("sights").hidden = true;
  }

  // Show what a context is said to hold, as the conversation has it.
  show(messages, { media, block_size: blockSize }) {
    this.clear();
    const shown = shownIn(messages);
    this.#sights = media.map((item, i) => new Sight(item, shown[i], `${NAMES[item.kind]} ${i + 1}`, blockSize));
    for (const sight of this.#sights) sight.onBlock = this.#onBlock;
    $("sights").replaceChildren(...this.#sights.map(({ element }) => element));
    $("sights").hidden = !media.length;
  }

  // Show what one token read: `rows` are how many rows read each block, of `numRows`; `marked` is a block or null.
  draw(rows, numRows, marked) {
    for (const sight of this.#sights) sight.draw(rows, numRows, marked);
  }
}

const NAMES = { image: "Picture", video: "Video" };

class Sight {
  onBlock = () => {};
  #item;
  #block;
  #frame = 0;
  #last = null;
  #canvas = element("canvas");
  #view;
  #slider = null;
  #time = element("output");
  #read = element("span");

  constructor(item, shown, name, blockSize) {
    this.#item = item;
    const [frames, height, width] = item.grid;
    // The block of each cell.
    this.#block = new Int32Array(frames * height * width).fill(-1);
    for (const [token, cell, count] of item.runs) {
      for (let i = 0; i < count; i++) this.#block[cell + i] = Math.floor((token + i) / blockSize);
    }
    this.#view = shown?.shown ? view(shown, name) : element("div");
    this.#canvas.setAttribute("aria-hidden", "true");
    this.#canvas.onclick = (event) => this.#click(event);
    const stage = element("div", this.#view, this.#canvas);
    stage.className = "stage";
    stage.style.aspectRatio = `${item.size[1]} / ${item.size[0]}`;
    stage.style.maxWidth = `min(100%, ${Math.round((320 * item.size[1]) / item.size[0])}px)`;
    const [from, to] = [this.#block[0], this.#block.at(-1)].map((block) => number.format(block));
    const blocks = from === to ? `block ${from}` : `blocks ${from} to ${to}`;
    const caption = element("figcaption", element("b", name), ` · ${blocks} · `, this.#read);
    this.element = element("figure", stage, ...this.#frames(frames, name), caption);
    this.#view.onloadeddata = () => this.#seek();
    new ResizeObserver(() => this.#redraw()).observe(stage);
  }

  draw(rows, numRows, marked) {
    this.#last = { rows, numRows, marked };
    this.#redraw();
  }

  // A slider over the frames of a video.
  #frames(frames, name) {
    if (this.#item.kind !== "video") return [];
    const slider = Object.assign(element("input"), { type: "range", min: 0, max: frames - 1, value: 0 });
    slider.setAttribute("aria-label", `Frame of ${name}`);
    slider.oninput = () => {
      this.#frame = Number(slider.value);
      this.#seek();
      this.#redraw();
    };
    this.#slider = slider;
    const line = element("div", slider, this.#time);
    line.className = "frames";
    return [line];
  }

  #seek() {
    if (this.#item.kind !== "video") return;
    const second = this.#item.seconds?.[this.#frame] ?? 0;
    if ("currentTime" in this.#view) this.#view.currentTime = second;
    this.#time.textContent = `${second.toFixed(1)} s`;
    this.#slider.setAttribute("aria-valuetext", this.#time.textContent);
  }

  #redraw() {
    const canvas = this.#canvas;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!this.#last || !width) return;
    const ratio = Math.min(2, devicePixelRatio);
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    const [, rows, columns] = this.#item.grid;
    const first = this.#frame * rows * columns;
    // Whole pixels, so that neighbours neither overlap nor leave a gap.
    const left = (column) => Math.round((column * canvas.width) / columns);
    const top = (row) => Math.round((row * canvas.height) / rows);
    const color = getComputedStyle($("c-new")).backgroundColor;
    const marks = new Path2D();
    for (let cell = 0; cell < rows * columns; cell++) {
      const block = this.#block[first + cell];
      const share = (this.#last.rows[block] ?? 0) / this.#last.numRows;
      const [column, row] = [cell % columns, Math.floor(cell / columns)];
      const box = [left(column), top(row), left(column + 1) - left(column), top(row + 1) - top(row)];
      context.globalAlpha = share ? 0.15 + 0.45 * share : 1;
      context.fillStyle = share ? color : VEIL;
      context.fillRect(...box);
      if (block === this.#last.marked) marks.rect(...box);
    }
    context.globalAlpha = 1;
    context.strokeStyle = "#fff";
    context.lineWidth = ratio;
    context.stroke(marks);
    this.#tell();
  }

  #tell() {
    const blocks = [...new Set(this.#block)].filter((block) => block >= 0);
    const read = blocks.filter((block) => this.#last.rows[block]).length;
    this.#read.textContent = `this token reads ${number.format(read)} of ${number.format(blocks.length)}`;
    this.element.dataset.read = read;
  }

  #click(event) {
    const [, rows, columns] = this.#item.grid;
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const column = Math.min(columns - 1, Math.floor((event.offsetX / width) * columns));
    const row = Math.min(rows - 1, Math.floor((event.offsetY / height) * rows));
    this.onBlock(this.#block[(this.#frame * rows + row) * columns + column]);
  }
}
