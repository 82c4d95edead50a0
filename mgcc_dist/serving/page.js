const UNDO_BYTES = 2 ** 27;
const STORAGE = "mgcc serve";
function readToken() {
  if (location.hash.length > 1) {
    sessionStorage.setItem(STORAGE, location.hash.slice(1));
    history.replaceState(null, "", location.pathname); // so that the token is in no bookmark
  }
  return sessionStorage.getItem(STORAGE) || "";
}
let token = readToken();
let state = null, list = [], position = -1, item = null;
let mask = null, predicted = null, before = null, undoStack = [], redoStack = [], unsaved = false;
let brush = { x: 0, y: 0 }, panned = null, stroke = null, timer = 0, opened = 0, measured = 0, waiting = 0;

async function api(path, options = {}) {
  let answer;
  try {
    answer = await fetch("/api/" + path, { ...options, headers: { Authorization: "Bearer " + token, ...options.headers } });
  } catch (error) {
    throw new Error(`mgcc serve does not answer. Start it again with --port ${location.port} and put its new address into this tab; nothing is lost.`);
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text;
  try { message = JSON.parse(text).error; } catch (error) { /* not of the application */ }
  throw Object.assign(new Error(message || answer.statusText), { status: answer.status });
}
const json = async (path, options) => (await api(path, options)).json();
const bytes = async path => new Uint8Array(await (await api(path)).arrayBuffer());
function say(text, bad = false) {
  $("message").className = bad ? "bad" : "";
  $("message").setAttribute("role", bad ? "alert" : "status");
  $("message").textContent = text;
}
const attempt = work => async (...words) => { try { await work(...words); } catch (error) { say(error.message, true); } };

// The queue and the list of images that this tab has shown.
function showQueue(queue) {
  state.queue = queue;
  $("queue").hidden = !queue.total;
  $("bar").max = queue.total; $("bar").value = queue.corrected;
  const unreadable = queue.unreadable ? `, ${queue.unreadable} unreadable` : "";
  $("queue-text").textContent = `${queue.corrected} of ${queue.total} corrected${unreadable}`;
  $("scored-bar").max = queue.left; $("scored-bar").value = queue.scored;
  $("scored").textContent = `${queue.scored} of ${queue.left} scored`;
  updateButtons();
}
function updateButtons() {
  $("previous").disabled = position < 1;
  $("next").disabled = !(position + 1 < list.length || state.queue.total);
  for (const id of ["save", "reset", "clear"]) $(id).disabled = !item;
  $("undo").disabled = !undoStack.length; $("redo").disabled = !redoStack.length;
}
const mayLeave = () => !unsaved || confirm("The mask has unsaved changes. Discard them?");
async function next(early = false) {
  if (!mayLeave()) return;
  if (position + 1 < list.length) { await show(position + 1); return; }
  if (!state.queue.total) return;
  const answer = await json("next" + (early ? "?early=1" : ""));
  showQueue(answer.queue);
  if (answer.id) { list.push(answer.id); await show(list.length - 1); return; }
  if (answer.queue.left) { wait(); return; }
  say(`All images are corrected (${answer.queue.corrected} of ${answer.queue.total}). They are in ${state.out}.`);
}
async function previous() { if (position > 0 && mayLeave()) await show(position - 1); }
function wait() {
  close();
  $("empty").hidden = true; $("waiting").hidden = false;
  clearInterval(waiting);
  waiting = setInterval(attempt(async () => {
    const { queue } = await json("state");
    showQueue(queue);
    if (queue.scored < queue.left || $("waiting").hidden) return;
    clearInterval(waiting);
    await next();
  }), 700);
}

// One image.
function close() {
  item = mask = predicted = before = null; unsaved = false;
  undoStack = []; redoStack = [];
  $("sheet").hidden = true; $("empty").hidden = false;
  $("name").textContent = "No image"; $("about").textContent = $("score").textContent = "";
  $("measures").replaceChildren(); $("unit").textContent = "";
  updateButtons();
}
async function show(index) {
  const mine = ++opened, id = list[index];
  clearInterval(waiting);
  close();
  position = index;
  $("empty").hidden = true; $("waiting").hidden = true;
  say("Segmenting …");
  try {
    const found = await json("items/" + id);
    const [grey, network, uncertainty, saved] = await Promise.all([
      bytes(`items/${id}/image`), bytes(`items/${id}/predicted`),
      found.score === null ? null : bytes(`items/${id}/uncertainty`), found.saved ? bytes(`items/${id}/saved`) : null,
    ]);
    if (mine !== opened) return; // another one was opened meanwhile
    await setPicture(grey, found.width, found.height);
    if (mine !== opened) return;
    item = found; predicted = network; heat = uncertainty; mask = (saved || network).slice();
    $("show-heat").disabled = !heat;
    brush = { x: item.width / 2, y: item.height / 2 };
    $("size").max = Math.max(2, Math.round(Math.max(item.width, item.height) / 5));
    $("size").value = Math.max(1, Math.round(Math.max(item.width, item.height) / 40));
    describe();
    $("sheet").hidden = false;
    view.fitted = true;
    showMeasures(item.saved || item.predicted);
    layout();
    say(saved ? "This is your saved correction." : "");
  } catch (error) {
    if (mine !== opened) return;
    $("empty").hidden = false;
    say(error.message, true);
  } finally { if (mine === opened) updateButtons(); }
}
function describe() {
  const parts = [`${item.width} × ${item.height} px`];
  if (item.frames > 1) parts.push(`frame ${item.frame} of ${item.frames}`);
  if (item.regions > 1) parts.push(`region ${item.region} of ${item.regions}`);
  const sides = item.spacing && [...new Set(item.spacing.map(each => +each.toPrecision(3)))];
  parts.push(sides ? `${sides.join(" × ")} mm per px` : "pixel size unknown");
  $("name").textContent = item.label; $("about").textContent = parts.join(", ");
  const words = { tta: "mirrored views", decoders: "decoders", ensemble: "runs" }[state.uncertainty];
  const found = item.predicted.area ? "" : "No lesion found. ", low = item.predicted.area ? "" : "; low without a lesion";
  const score = item.score === null ? "" : `Score ${item.score.toFixed(2)}: how well ${words} agree, 1 is best${low}. `;
  $("score").textContent = `${found}${score}Confidence ${item.confidence.toFixed(2)}.`;
}
function showMeasures(yours) {
  const row = (label, digits, key) => {
    const line = document.createElement("tr"), head = Object.assign(document.createElement("th"), { scope: "row", textContent: label });
    line.append(head, ...[item.predicted, yours].map(each => Object.assign(document.createElement("td"), { textContent: each[key].toFixed(digits) })));
    return line;
  };
  $("unit").textContent = `in ${item.predicted.unit}`;
  const area = item.spacing ? row("area (mm²)", 1, "area") : row("area", 0, "area");
  $("measures").replaceChildren(area, row("longest", 1, "longest"), row("perpendicular", 1, "perpendicular"), row("lesions", 0, "lesions"));
  lines = yours.lines;
  drawLines();
}
function measureSoon() {
  clearTimeout(timer);
  const id = item.id, mine = ++measured;
  timer = setTimeout(attempt(async () => {
    const measures = await json(`items/${id}/measures`, { method: "POST", body: mask });
    if (item?.id === id && mine === measured) showMeasures(measures);
  }), 150);
}

// The brush: every pixel whose centre is within its radius of the line from the last position to this one.
function paint(x0, y0, x1, y1) {
  const radius = Number($("size").value), value = $("erase").checked ? 0 : 255;
  const box = {
    left: Math.max(0, Math.floor(Math.min(x0, x1) - radius)), top: Math.max(0, Math.floor(Math.min(y0, y1) - radius)),
    right: Math.min(item.width, Math.ceil(Math.max(x0, x1) + radius)), bottom: Math.min(item.height, Math.ceil(Math.max(y0, y1) + radius)),
  };
  if (box.right <= box.left || box.bottom <= box.top) return;
  const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
  for (let y = box.top; y < box.bottom; y++) {
    for (let x = box.left; x < box.right; x++) {
      const along = length ? Math.min(1, Math.max(0, ((x + .5 - x0) * dx + (y + .5 - y0) * dy) / length)) : 0;
      if (Math.hypot(x + .5 - x0 - along * dx, y + .5 - y0 - along * dy) <= radius) mask[y * item.width + x] = value;
    }
  }
  stroke = unite(stroke, box);
  drawMask(box);
}
function begin() { if (!before) { before = mask.slice(); stroke = null; } }
function finish() {
  if (before && stroke) record(stroke, before);
  before = stroke = null;
}
function cut(pixels, box) {
  const columns = box.right - box.left, part = new Uint8Array(columns * (box.bottom - box.top));
  for (let y = box.top; y < box.bottom; y++) part.set(pixels.subarray(y * item.width + box.left, y * item.width + box.right), (y - box.top) * columns);
  return { box, part };
}
function record(box, old) {
  undoStack.push(cut(old, box));
  while (undoStack.length > 1 && undoStack.reduce((sum, each) => sum + each.part.length, 0) > UNDO_BYTES) undoStack.shift();
  redoStack = [];
  changed();
}
function changed() { unsaved = true; say(""); updateButtons(); measureSoon(); }
function restore(from, to) {
  if (!item || before || !from.length) return;
  const { box, part } = from.pop(), columns = box.right - box.left;
  to.push(cut(mask, box));
  for (let y = box.top; y < box.bottom; y++) mask.set(part.subarray((y - box.top) * columns, (y - box.top + 1) * columns), y * item.width + box.left);
  drawMask(box);
  changed();
}
function replace(pixels) {
  if (!item || before) return;
  const old = mask;
  mask = pixels;
  drawMask(all());
  record(all(), old);
}
async function save() {
  if (!item) return;
  finish();
  const saving = item, body = mask.slice();
  const put = revision => json(`items/${saving.id}/correction?key=${saving.key}&revision=${revision}`, { method: "PUT", body });
  say("Saving …");
  let answer;
  try {
    answer = await put(saving.revision);
  } catch (error) {
    if (error.status !== 409 || !confirm(`${error.message}. Replace it with yours?`)) throw error;
    answer = await put((await json("items/" + saving.id)).revision);
  }
  saving.revision = answer.revision;
  showQueue(answer.queue);
  if (item !== saving) return;
  unsaved = body.some((value, i) => value !== mask[i]); // strokes since
  say(`Saved as ${saving.name}.png in ${state.out}.`);
}
async function saveAndNext() { await save(); if (item && !unsaved && !$("next").disabled) await next(); }

// Files.
async function receive(files) {
  if (!state || !files.length || !mayLeave()) return;
  const problems = [];
  let shown = false;
  for (const [i, file] of files.entries()) {
    say(files.length > 1 ? `Reading ${file.name} (${i + 1} of ${files.length}) …` : `Reading ${file.name} …`);
    try {
      if (file.size > state.max_upload) throw new Error(`${file.name}: is larger than --max-upload-mb`);
      const { ids } = await json("uploads", { method: "POST", body: file, headers: { "X-File-Name": encodeURIComponent(file.name) } });
      list.push(...ids);
      updateButtons();
      if (shown) continue;
      shown = true;
      await show(list.length - ids.length); // the others follow while it is corrected
    } catch (error) { problems.push(error.message); }
  }
  const more = problems.length > 3 ? ` · and ${problems.length - 3} more` : "";
  if (problems.length) say(problems.slice(0, 3).join(" · ") + more, true);
  else if (files.length > 1) say(`Read ${files.length} files. n shows the next one.`);
}
const open = attempt(receive);
$("file").onchange = event => { open([...event.target.files]); event.target.value = ""; };
document.addEventListener("dragover", event => { event.preventDefault(); $("stage").classList.add("over"); });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) $("stage").classList.remove("over"); });
document.addEventListener("drop", event => {
  event.preventDefault();
  $("stage").classList.remove("over");
  if (event.dataTransfer.files.length) open([...event.dataTransfer.files]);
  else say("Drop a file, not a link or text.", true);
});

// Mouse, pen and finger.
const sheet = $("sheet");
const onStage = event => { const box = sheet.getBoundingClientRect(); return { x: event.clientX - box.left, y: event.clientY - box.top }; };
sheet.onpointerdown = event => {
  if (!item || event.button > 2 || before || panned) return;
  sheet.setPointerCapture(event.pointerId);
  if (event.button) { event.preventDefault(); panned = onStage(event); return; } // middle or right
  brush = toImage(onStage(event));
  begin();
  paint(brush.x, brush.y, brush.x, brush.y);
};
sheet.onpointermove = event => {
  if (!item) return;
  const last = brush, now = onStage(event);
  if (panned) { move(now.x - panned.x, now.y - panned.y); panned = now; return; }
  $("brush").hidden = false;
  brush = toImage(now);
  if (before && event.buttons) paint(last.x, last.y, brush.x, brush.y);
  drawBrush();
};
sheet.onpointerup = sheet.onpointercancel = () => { panned = null; finish(); };
sheet.oncontextmenu = event => event.preventDefault();
sheet.addEventListener("wheel", event => {
  event.preventDefault(); // also of a pinch on a touchpad, which the browser reports as a wheel with Ctrl
  const ticks = event.deltaMode ? event.deltaY : event.deltaY / (event.ctrlKey ? 5 : 40);
  zoom(Math.exp(-Math.max(-4, Math.min(4, ticks)) / 12), onStage(event));
}, { passive: false });
sheet.onpointerleave = () => { $("brush").hidden = document.activeElement !== sheet; };

// Keyboard.
sheet.onfocus = () => { $("brush").hidden = false; drawBrush(); };
sheet.onblur = () => { $("brush").hidden = true; finish(); };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
sheet.onkeydown = event => {
  if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") {
    event.preventDefault();
    begin();
    paint(brush.x, brush.y, brush.x, brush.y);
  } else if (event.key in ARROWS) {
    event.preventDefault();
    const step = event.shiftKey ? 1 : Math.max(1, Math.round($("size").value / 2)), [dx, dy] = ARROWS[event.key], last = brush;
    brush = { x: Math.min(item.width, Math.max(0, last.x + dx * step)), y: Math.min(item.height, Math.max(0, last.y + dy * step)) };
    if (before) paint(last.x, last.y, brush.x, brush.y);
    reveal(brush);
    drawBrush();
  }
};
sheet.onkeyup = event => { if (event.key === " ") finish(); };
const resize = factor => { $("size").value = Math.max(1, Math.round($("size").value * factor) + (factor > 1 ? 1 : -1)); drawBrush(); };
const choose = id => { $(id).checked = true; drawBrush(); };
const toggle = id => { if (!$(id).disabled) $(id).checked = !$(id).checked; layout(); };
const undo = () => restore(undoStack, redoStack), redo = () => restore(redoStack, undoStack);
const keys = {
  a: () => choose("add"), e: () => choose("erase"), "[": () => resize(.85), "]": () => resize(1.15), z: undo, y: redo,
  m: () => toggle("show-mask"), u: () => toggle("show-heat"), l: () => toggle("show-lines"),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(.8), 0: fit,
  s: attempt(save), d: attempt(saveAndNext), n: attempt(() => next()), p: attempt(previous), o: () => $("file").click(),
};
const withControl = { z: undo, y: redo, s: keys.s, Z: redo };
document.addEventListener("keydown", event => {
  const known = event.ctrlKey || event.metaKey ? withControl : keys;
  if (event.altKey || !state || !Object.hasOwn(known, event.key)) return;
  event.preventDefault();
  known[event.key]();
});
for (const [id, act] of [["undo", undo], ["redo", redo], ["save", keys.s], ["next", keys.n], ["previous", keys.p], ["choose", keys.o], ["early", attempt(() => next(true))], ["larger", keys["+"]], ["smaller", keys["-"]], ["fit", fit], ["reset", () => replace(predicted.slice())], ["clear", () => replace(new Uint8Array(mask.length))]]) $(id).onclick = act;
for (const id of ["show-mask", "show-heat", "show-lines"]) $(id).onchange = layout;
for (const id of ["add", "erase", "size"]) $(id).oninput = drawBrush;
for (const id of ["brightness", "contrast"]) $(id).oninput = drawGrey;
$("grey").onclick = () => { $("brightness").value = $("contrast").value = 100; drawGrey(); };
window.addEventListener("resize", layout);
window.addEventListener("hashchange", attempt(async () => { // another token, after a restart: what is painted stays
  const had = state;
  token = readToken();
  await connect();
  if (had) say("Connected to the new start of mgcc serve.");
}));
window.addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
async function connect() {
  state = await json("state");
  $("model").textContent = `${state.model} (${state.method}${state.dataset ? ", " + state.dataset : ""}), ${state.device}`;
  showQueue(state.queue);
  if (state.queue.total && !item) await next();
}
attempt(connect)();
