// What stands around the X-ray's picture: layers at the left, documents above, blocks below; and the overlap's curve.

export const GUTTER = 44;
export const STRIP = 16;
export const TICKS = 18;
const LAYER_GAP = 22;
const TICK_GAP = 80;

const number = new Intl.NumberFormat("en-US");

// `outline` is what /xray/context said, null before.
export function drawAxes(canvas, map, outline) {
  const context = scaled(canvas, map.ratio);
  context.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  context.fillStyle = getComputedStyle(canvas).color;
  const width = map.canvas.clientWidth;
  drawLayers(context, map);
  drawBlocks(context, map, width);
  drawParts(context, map, outline, width);
}

// The part of a token's blocks that the token before read, for all tokens, and where `index` is.
export function drawSpark(canvas, ratio, overlaps, index) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = scaled(canvas, ratio);
  const last = Math.max(1, overlaps.length - 1);
  context.strokeStyle = context.fillStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5;
  context.beginPath();
  const step = Math.max(1, Math.floor(overlaps.length / width));
  for (let i = 1; i < overlaps.length; i += step) {
    context.lineTo(1 + (i / last) * (width - 2), 2 + (1 - overlaps[i]) * (height - 4));
  }
  context.stroke();
  context.fillRect((index / last) * (width - 2), 0, 2, height);
}

function scaled(canvas, ratio) {
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  return context;
}

function drawLayers(context, map) {
  const height = map.rowHeight / map.ratio;
  context.textAlign = "right";
  context.textBaseline = "middle";
  let free = -Infinity;
  map.recording.rows.forEach(({ layer, group }, row) => {
    const y = Math.max(STRIP + 6, STRIP + (row + 0.5) * height);
    if (group || y < free) return;
    context.fillText(row ? layer : `layer ${layer}`, GUTTER - 6, y);
    free = y + LAYER_GAP;
  });
}

function drawBlocks(context, map, width) {
  const y = STRIP + (map.recording.rows.length * map.rowHeight) / map.ratio + 4;
  context.textBaseline = "top";
  const step = round((map.span * TICK_GAP) / width);
  for (let block = Math.ceil(map.first / step) * step; block < map.recording.numBlocks; block += step) {
    const place = map.place(block);
    const x = place.x + place.width / 2;
    if (x > width - 14) return;
    context.textAlign = x < 20 ? "left" : "center";
    context.fillText(number.format(block), GUTTER + (x < 20 ? Math.max(0, place.x) : x), y);
  }
}

function drawParts(context, map, outline, width) {
  context.textAlign = "left";
  context.textBaseline = "middle";
  outline?.parts.forEach(({ role, source, tokens }, i) => {
    const left = Math.max(0, map.place(tokens[0] / outline.block_size).x);
    const right = Math.min(width, map.place(tokens[1] / outline.block_size).x);
    if (right - left < 1) return;
    context.globalAlpha = i % 2 ? 0.24 : 0.12;
    context.fillRect(GUTTER + left, 0, Math.max(1, right - left - 1), STRIP - 3);
    context.globalAlpha = 1;
    const name = fitted(context, source ?? role, right - left - 8);
    if (name) context.fillText(name, GUTTER + left + 4, (STRIP - 3) / 2 + 0.5);
  });
}

// The next of 1, 2, 5, 10, 20 ... that is at least `least`.
function round(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least);
}

// As much of a name as has room, from its start.
function fitted(context, name, width) {
  if (context.measureText(name).width <= width) return name;
  for (let length = name.length - 1; length > 1; length--) {
    const short = `${name.slice(0, length)}…`;
    if (context.measureText(short).width <= width) return short;
  }
  return "";
}
