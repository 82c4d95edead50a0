"use strict";
// The layers of the image. They have the size of the stage and show the part of the image that zoom and pan select, so
// that drawing takes the same time for any image.
const $ = id => document.getElementById(id);
const MASK = [255, 90, 78], HEAT = [64, 196, 255], LINES = "#ffd54a";
const LAYERS = ["picture", "heat", "mask", "lines"], MARGIN = 12, MAX_SCALE = 40, REDUCED = 2048;
const view = { scale: 1, left: 0, top: 0, fitted: true }; // CSS pixels per image pixel; the image position at the stage's corner
let picture = null, reduced = null, heat = null, lines = [];

const all = () => ({ left: 0, top: 0, right: item.width, bottom: item.height });
const unite = (a, b) => a ? { left: Math.min(a.left, b.left), top: Math.min(a.top, b.top), right: Math.max(a.right, b.right), bottom: Math.max(a.bottom, b.bottom) } : b;
const toScreen = ({ x, y }) => ({ x: (x - view.left) * view.scale, y: (y - view.top) * view.scale });
const toImage = ({ x, y }) => ({ x: x / view.scale + view.left, y: y / view.scale + view.top });
const stageSize = () => [$("stage").clientWidth, $("stage").clientHeight];
const fittingScale = () => { const [width, height] = stageSize(); return Math.min((width - 2 * MARGIN) / item.width, (height - 2 * MARGIN) / item.height); };

async function setPicture(grey, width, height) {
  const pixels = new ImageData(width, height), words = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < grey.length; i++) words[i] = 0xff000000 | grey[i] * 0x010101;
  const factor = REDUCED / Math.max(width, height);
  const options = { resizeWidth: Math.max(1, Math.round(width * factor)), resizeHeight: Math.max(1, Math.round(height * factor)), resizeQuality: "high" };
  [picture, reduced] = await Promise.all([createImageBitmap(pixels), factor < 1 ? createImageBitmap(pixels, options) : null]);
}

// Zoom and pan.
function layout() {
  if (!item) return;
  const [width, height] = stageSize(), ratio = devicePixelRatio;
  for (const layer of LAYERS) {
    const canvas = $(layer), size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  }
  for (const layer of ["mask", "lines", "heat"]) $(layer).hidden = !$(`show-${layer}`).checked;
  if (view.fitted) fit(); else move(0, 0);
}
function fit() {
  if (!item) return;
  view.fitted = true;
  view.scale = fittingScale();
  centre(item.width / 2, item.height / 2);
}
function zoom(factor, at) {
  if (!item) return;
  const [width, height] = stageSize();
  at ??= { x: width / 2, y: height / 2 };
  const kept = toImage(at), scale = Math.min(view.scale * factor, Math.max(MAX_SCALE, fittingScale()));
  if (scale <= fittingScale()) { fit(); return; }
  view.fitted = false;
  view.scale = scale;
  view.left = kept.x - at.x / scale;
  view.top = kept.y - at.y / scale;
  move(0, 0);
}
function centre(x, y) {
  const [width, height] = stageSize();
  view.left = x - width / view.scale / 2;
  view.top = y - height / view.scale / 2;
  draw();
}
function move(dx, dy) { // by CSS pixels; the middle of the stage stays on the image
  if (!item || view.fitted) return;
  const [width, height] = stageSize(), { x, y } = toImage({ x: width / 2 - dx, y: height / 2 - dy });
  centre(Math.min(item.width, Math.max(0, x)), Math.min(item.height, Math.max(0, y)));
}
function reveal(point) { // so that the keyboard does not move the brush out of sight
  const [width, height] = stageSize(), { x, y } = toScreen(point);
  const beyond = (value, side) => Math.min(0, side - MARGIN - value) || Math.max(0, MARGIN - value);
  const dx = beyond(x, width), dy = beyond(y, height);
  if (dx || dy) move(dx, dy);
}

// Drawing.
function draw() {
  drawPicture();
  drawHeat();
  cleared("mask");
  drawMask(all());
  drawLines();
  drawBrush();
  $("zoom-text").textContent = `${Math.round(100 * view.scale)} %`;
}
function cleared(layer) {
  const canvas = $(layer), pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  return pen;
}
function drawPicture() {
  const pen = cleared("picture"), scale = view.scale * devicePixelRatio;
  pen.imageSmoothingEnabled = scale < 4;
  pen.imageSmoothingQuality = "high";
  const source = reduced && scale * item.width <= reduced.width ? reduced : picture;
  pen.drawImage(source, -view.left * scale, -view.top * scale, item.width * scale, item.height * scale);
}
// The values of an image at the canvas pixels of a box, 0 outside the image. Sampling, because both masks and maps are
// drawn at any scale.
function sample(values, left, top, width, height) {
  const scale = view.scale * devicePixelRatio, found = new Uint8Array(width * height), columns = new Int32Array(width);
  for (let x = 0; x < width; x++) columns[x] = Math.floor((left + x + .5) / scale + view.left);
  for (let y = 0; y < height; y++) {
    const row = Math.floor((top + y + .5) / scale + view.top);
    if (row < 0 || row >= item.height) continue;
    for (let x = 0; x < width; x++) {
      if (columns[x] >= 0 && columns[x] < item.width) found[y * width + x] = values[row * item.width + columns[x]];
    }
  }
  return found;
}
function drawHeat() {
  const pen = cleared("heat"), { width, height } = $("heat");
  if (!heat || $("heat").hidden) return;
  const values = sample(heat, 0, 0, width, height), pixels = new ImageData(width, height), data = pixels.data;
  for (let i = 0, to = 0; i < values.length; i++, to += 4) {
    if (!values[i]) continue;
    data[to] = HEAT[0]; data[to + 1] = HEAT[1]; data[to + 2] = HEAT[2]; data[to + 3] = 150 * Math.sqrt(values[i] / 255);
  }
  pen.putImageData(pixels, 0, 0);
}
function drawMask(box) { // the part of the mask in a box of the image
  const canvas = $("mask"), scale = view.scale * devicePixelRatio, line = Math.max(1, Math.round(1.5 * devicePixelRatio));
  const left = Math.max(0, Math.floor((box.left - view.left) * scale) - line), top = Math.max(0, Math.floor((box.top - view.top) * scale) - line);
  const right = Math.min(canvas.width, Math.ceil((box.right - view.left) * scale) + line), bottom = Math.min(canvas.height, Math.ceil((box.bottom - view.top) * scale) + line);
  if (right <= left || bottom <= top) return;
  const width = right - left + 2 * line, values = sample(mask, left - line, top - line, width, bottom - top + 2 * line);
  const pixels = new ImageData(right - left, bottom - top), data = pixels.data;
  for (let y = top, to = 0; y < bottom; y++) {
    let i = (y - top + line) * width + line;
    for (let x = left; x < right; x++, i++, to += 4) {
      if (!values[i]) continue;
      const inside = values[i - line] && values[i + line] && values[i - line * width] && values[i + line * width];
      data[to] = MASK[0]; data[to + 1] = MASK[1]; data[to + 2] = MASK[2]; data[to + 3] = inside ? 70 : 255;
    }
  }
  canvas.getContext("2d").putImageData(pixels, left, top);
}
function drawLines() { // the diameters
  const pen = cleared("lines"), ratio = devicePixelRatio;
  pen.strokeStyle = LINES; pen.lineWidth = 2 * ratio; pen.setLineDash([5 * ratio, 3 * ratio]);
  for (const ends of lines) {
    const [start, end] = ends.map(([x, y]) => toScreen({ x, y }));
    pen.beginPath(); pen.moveTo(start.x * ratio, start.y * ratio); pen.lineTo(end.x * ratio, end.y * ratio); pen.stroke();
  }
}
function drawBrush() {
  if (!item) return;
  const diameter = Math.max(3, 2 * $("size").value * view.scale), cursor = $("brush"), { x, y } = toScreen(brush);
  cursor.className = $("erase").checked ? "erase" : "";
  cursor.style.width = cursor.style.height = `${diameter}px`;
  cursor.style.left = `${x}px`; cursor.style.top = `${y}px`;
  $("size-text").textContent = `${2 * $("size").value} px`;
}
function drawGrey() { $("picture").style.filter = `brightness(${$("brightness").value}%) contrast(${$("contrast").value}%)`; }
