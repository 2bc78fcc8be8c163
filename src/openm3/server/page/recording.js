// Which blocks each token of one answer read, packed so that any token can be shown at once.

const SOMETIMES = 4;
const OFTEN = 32;

export class Recording {
  // One row for each group of each sparse layer, in order; dense layers read everything and have no row.
  rows = [];
  dense = [];
  numBlocks = 0;
  complete = false;
  ids = [];
  overlaps = [];
  #tokens = [];
  #counts = new Uint16Array(0);
  #levels = new Uint8Array(0);
  #stride = 0;

  // `request` holds what the answer's prompt was made of: {messages, thinking}.
  constructor(request) {
    this.request = request;
  }

  get length() {
    return this.#tokens.length;
  }

  // Add tokens as the server sends them: `looked[token][layer][group]` are ascending ids of blocks.
  add(ids, looked) {
    looked.forEach((blocks, i) => {
      if (!this.length) this.#name(blocks);
      const lists = this.rows.map(({ layer, group }) => blocks[layer]?.[group] ?? []);
      const starts = new Uint32Array(lists.length + 1);
      lists.forEach((list, row) => (starts[row + 1] = starts[row] + list.length));
      const token = { starts, ids: Uint32Array.from(lists.flat()) };
      for (const block of token.ids) this.numBlocks = Math.max(this.numBlocks, block + 1);
      this.overlaps.push(this.length ? overlap(this.#tokens.at(-1), token) : NaN);
      this.#tokens.push(token);
      this.#count(token);
      this.ids.push(ids[i]);
    });
  }

  // No more tokens come.
  finish() {
    this.complete = true;
  }

  // {starts, ids}: row r read the blocks ids[starts[r]] to before ids[starts[r + 1]].
  token(index) {
    return this.#tokens[index];
  }

  // How many tokens of the answer read this block in this row.
  count(row, block) {
    return this.#counts[row * this.#stride + block];
  }

  // How often each block was read in this row: 0 never, 1 seldom, 3 at times, 7 often. Joined by or, the most often.
  levels(row) {
    return this.#levels.subarray(row * this.#stride, row * this.#stride + this.numBlocks);
  }

  // How many rows read each block at a token.
  readers(index) {
    const rows = new Uint16Array(this.numBlocks);
    for (const block of this.#tokens[index].ids) rows[block]++;
    return rows;
  }

  // The blocks that most rows read at a token, most first: [block, rows].
  top(index, limit) {
    const rows = this.readers(index);
    const found = [];
    for (let block = 0; block < rows.length; block++) {
      if (!rows[block] || (found.length === limit && rows[block] <= found.at(-1)[1])) continue;
      const place = found.findIndex(([, count]) => count < rows[block]);
      found.splice(place < 0 ? found.length : place, 0, [block, rows[block]]);
      found.length = Math.min(limit, found.length);
    }
    return found;
  }

  #name(blocks) {
    blocks.forEach((groups, layer) => {
      if (!groups.length) this.dense.push(layer);
      groups.forEach((_, group) => this.rows.push({ layer, group }));
    });
  }

  #count({ starts, ids }) {
    if (this.numBlocks > this.#stride) {
      const stride = Math.max(64, 2 * this.#stride, this.numBlocks);
      const size = this.rows.length * stride;
      this.#counts = spread(this.#counts, new Uint16Array(size), this.#stride, stride);
      this.#levels = spread(this.#levels, new Uint8Array(size), this.#stride, stride);
      this.#stride = stride;
    }
    for (let row = 0; row + 1 < starts.length; row++) {
      for (let i = starts[row]; i < starts[row + 1]; i++) {
        const at = row * this.#stride + ids[i];
        if (this.#counts[at] < 65535) this.#counts[at]++;
        this.#levels[at] = this.#counts[at] < SOMETIMES ? 1 : this.#counts[at] < OFTEN ? 3 : 7;
      }
    }
  }
}

// Rows of one length into longer ones.
function spread(from, to, before, after) {
  for (let row = 0; row * before < from.length; row++) {
    to.set(from.subarray(row * before, (row + 1) * before), row * after);
  }
  return to;
}

// The part of a token's blocks that the token before it read in the same row.
function overlap(before, token) {
  let kept = 0;
  for (let row = 0; row + 1 < token.starts.length; row++) {
    let i = before.starts[row];
    for (let k = token.starts[row]; k < token.starts[row + 1]; k++) {
      while (i < before.starts[row + 1] && before.ids[i] < token.ids[k]) i++;
      if (i < before.starts[row + 1] && before.ids[i] === token.ids[k]) kept++;
    }
  }
  return token.ids.length ? kept / token.ids.length : NaN;
}
