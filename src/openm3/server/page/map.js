// The X-ray's picture: rows are layers and groups, columns are blocks. Drawn as pixels, for 60 frames a second.
//
// What all tokens read is drawn once a view, as the ground. A frame puts the ground back where the last token's marks
// were and draws the new ones: a few thousand pixels, however long the context is.

const MOST_SCALE = 64;
const LEAST_MARK = 2;

export class BlockMap {
  recording = null;
  #context;
  #image = null;
  #ground = null;
  #frame = null;
  #marks = new Uint32Array(0);
  #numMarks = 0;
  #stale = true;
  #shown = { length: 0, numBlocks: 0 };

  // `colors` gives {fresh, kept, ever: [seldom, ..., often], even, odd} as 0xAABBGGRR.
  constructor(canvas, colors) {
    this.canvas = canvas;
    this.colors = colors;
    this.first = 0;
    this.scale = 1;
    this.ratio = 1;
    // Frames are written by the processor; a canvas in the GPU's memory would have to be sent each time.
    this.#context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  }

  show(recording) {
    this.recording = recording;
    this.#shown = { length: recording.length, numBlocks: recording.numBlocks };
    this.fit();
  }

  // Sizes in CSS pixels, `ratio` device pixels each.
  resize(width, height, ratio) {
    const whole = this.isWhole;
    this.ratio = ratio;
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.#image = this.#context.createImageData(this.canvas.width, this.canvas.height);
    this.#frame = new Uint32Array(this.#image.data.buffer);
    this.#ground = new Uint32Array(this.#frame.length);
    this.scale = Math.max(this.scale, this.#leastScale());
    if (whole) this.fit();
    else this.move(this.first);
  }

  recolor(colors) {
    this.colors = colors;
    this.#stale = true;
  }

  get isWhole() {
    return this.scale <= this.#leastScale() * 1.001;
  }

  // Blocks across the picture.
  get span() {
    return this.canvas.width / this.scale;
  }

  get rowHeight() {
    return Math.max(1, Math.floor(this.canvas.height / Math.max(1, this.recording?.rows.length ?? 1)));
  }

  fit() {
    this.first = 0;
    this.scale = this.#leastScale();
    this.#stale = true;
  }

  move(first) {
    this.first = Math.min(Math.max(0, first), Math.max(0, (this.recording?.numBlocks ?? 0) - this.span));
    this.#stale = true;
  }

  // Zoom so that the block at x (CSS pixels) stays there.
  zoom(factor, x) {
    const at = this.first + (x * this.ratio) / this.scale;
    const least = this.#leastScale();
    this.scale = Math.min(Math.max(least, this.scale * factor), Math.max(least, MOST_SCALE * this.ratio));
    this.move(at - (x * this.ratio) / this.scale);
  }

  // The row and block under a point in CSS pixels, null outside.
  at(x, y) {
    const row = Math.floor((y * this.ratio) / this.rowHeight);
    const block = Math.floor(this.first + (x * this.ratio) / this.scale);
    if (!this.recording || x < 0 || row < 0 || row >= this.recording.rows.length) return null;
    return block >= 0 && block < this.recording.numBlocks ? { row, block } : null;
  }

  // Left edge and width of a block in CSS pixels.
  place(block) {
    return { x: ((block - this.first) * this.scale) / this.ratio, width: this.scale / this.ratio };
  }

  // Draw one token's selection.
  draw(index) {
    const { recording } = this;
    if (!recording?.length || !this.#frame) return;
    this.#follow();
    if (this.#stale) this.#drawGround();
    else this.#restore();
    const token = recording.token(index);
    const before = index > 0 ? recording.token(index - 1) : null;
    if (this.#marks.length < token.ids.length) this.#marks = new Uint32Array(2 * token.ids.length);
    this.#numMarks = 0;
    // Two passes, so that what is new covers what is kept where both fall on one pixel.
    this.#drawMarks(token, before, false);
    this.#drawMarks(token, before, true);
    this.#context.putImageData(this.#image, 0, 0);
  }

  #leastScale() {
    return this.canvas.width / Math.max(1, this.recording?.numBlocks ?? 1);
  }

  // A recording that grew has new ground, and a whole view stays whole.
  #follow() {
    const { length, numBlocks } = this.recording;
    if (length === this.#shown.length && numBlocks === this.#shown.numBlocks) return;
    const was = this.canvas.width / Math.max(1, this.#shown.numBlocks);
    if (numBlocks !== this.#shown.numBlocks && this.scale <= was * 1.001) this.fit();
    this.#shown = { length, numBlocks };
    this.#stale = true;
  }

  // Rows and columns that are wide enough stand apart.
  get #gap() {
    return this.scale >= 4 * this.ratio ? Math.round(this.ratio) : 0;
  }

  get #markHeight() {
    return this.rowHeight > 3 * this.ratio ? this.rowHeight - Math.round(this.ratio) : this.rowHeight;
  }

  // Pixels of a block: start and end, cut to the picture.
  #left(block) {
    return Math.max(0, Math.floor((block - this.first) * this.scale));
  }

  #right(block) {
    const least = this.#left(block) + LEAST_MARK;
    const right = Math.max(least, Math.floor((block + 1 - this.first) * this.scale) - this.#gap);
    return Math.min(this.canvas.width, right);
  }

  #drawGround() {
    const { recording, rowHeight, colors } = this;
    const width = this.canvas.width;
    const { from, to } = this.#columns();
    const [seldom, sometimes, often] = colors.ever;
    this.#ground.fill(colors.even);
    for (let row = 0; row < recording.rows.length; row++) {
      const start = row * rowHeight * width;
      const back = recording.rows[row].layer % 2 ? colors.odd : colors.even;
      const color = Uint32Array.of(back, seldom, back, sometimes, back, back, back, often);
      const levels = recording.levels(row);
      this.#ground.fill(back, start, start + rowHeight * width);
      for (let x = 0; x < width; x++) {
        let level = 0;
        for (let block = from[x]; block < to[x]; block++) level |= levels[block];
        this.#ground[start + x] = color[level];
      }
      for (let y = 1; y < this.#markHeight; y++) this.#ground.copyWithin(start + y * width, start, start + width);
    }
    this.#frame.set(this.#ground);
    this.#stale = false;
  }

  // The blocks that each column of pixels shows; none in the gaps between them.
  #columns() {
    const { numBlocks } = this.recording;
    const from = new Int32Array(this.canvas.width);
    const to = new Int32Array(this.canvas.width);
    for (let x = 0; x < from.length; x++) {
      from[x] = Math.floor(this.first + x / this.scale);
      to[x] = Math.min(numBlocks, Math.max(from[x] + 1, Math.floor(this.first + (x + 1) / this.scale)));
      if (this.#gap && x >= this.#right(from[x])) to[x] = from[x];
    }
    return { from, to };
  }

  #restore() {
    const width = this.canvas.width;
    const { rowHeight } = this;
    for (let i = 0; i < this.#numMarks; i++) {
      const packed = this.#marks[i];
      const row = Math.floor(packed / 65536);
      const x = packed % 65536;
      const end = Math.min(width, x + this.#markWidth);
      for (let y = row * rowHeight; y < (row + 1) * rowHeight; y++) {
        this.#frame.set(this.#ground.subarray(y * width + x, y * width + end), y * width + x);
      }
    }
  }

  get #markWidth() {
    return Math.max(LEAST_MARK, Math.ceil(this.scale) + 1);
  }

  #drawMarks(token, before, fresh) {
    const width = this.canvas.width;
    const { rowHeight } = this;
    const height = this.#markHeight;
    const color = fresh ? this.colors.fresh : this.colors.kept;
    const first = this.first - 1;
    const end = this.first + this.span;
    const frame = this.#frame;
    for (let row = 0; row + 1 < token.starts.length; row++) {
      let i = before ? before.starts[row] : 0;
      const last = before ? before.starts[row + 1] : 0;
      for (let k = token.starts[row]; k < token.starts[row + 1]; k++) {
        const block = token.ids[k];
        while (i < last && before.ids[i] < block) i++;
        const kept = i < last && before.ids[i] === block;
        if (kept === fresh || block <= first || block >= end) continue;
        const left = this.#left(block);
        const right = this.#right(block);
        this.#marks[this.#numMarks++] = row * 65536 + left;
        for (let y = row * rowHeight; y < row * rowHeight + height; y++) {
          for (let x = y * width + left; x < y * width + right; x++) frame[x] = color;
        }
      }
    }
  }
}
