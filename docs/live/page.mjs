/** The live page: pictures, sliders and what the file answers. The model itself is run by ee_surgery.mjs. */

import { load } from "./ee_surgery.mjs";

const SIZE = 8; // of a digit, in pixels
const RUNS = 21;
const at = (id) => document.getElementById(id);
const pad = at("pad");
const ink = pad.getContext("2d", { willReadFrequently: true });

const state = { model: null, Tensor: null, pictures: [], shown: null, busy: false, stale: false };

/** Digits as a batch, each of 64 levels of ink in 0..16. */
function batch(digits) {
  const pixels = Float32Array.from(digits.flat(), (level) => level / 8 - 1);
  return new state.Tensor("float32", pixels, [digits.length, 1, SIZE, SIZE]);
}

/** What the pad shows as a digit: its ink, cut out and as high as the square, in the middle. */
function drawn() {
  const { width, height } = pad;
  const dark = (x, y, data) => data[4 * (y * width + x) + 3] > 127;
  const { data } = ink.getImageData(0, 0, width, height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!dark(x, y, data)) continue;
      [left, top] = [Math.min(left, x), Math.min(top, y)];
      [right, bottom] = [Math.max(right, x), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const small = new OffscreenCanvas(4 * SIZE, 4 * SIZE).getContext("2d", { willReadFrequently: true });
  const [w, h] = [right - left + 1, bottom - top + 1];
  const scale = (4 * SIZE) / Math.max(w, h);
  small.imageSmoothingQuality = "high";
  small.drawImage(pad, left, top, w, h, (4 * SIZE - w * scale) / 2, (4 * SIZE - h * scale) / 2, w * scale, h * scale);
  const fine = small.getImageData(0, 0, 4 * SIZE, 4 * SIZE).data;
  const levels = new Array(SIZE * SIZE).fill(0); // inked pixels of each 4 x 4 block
  for (let i = 0; i < 16 * SIZE * SIZE; i++) {
    levels[Math.floor(i / (16 * SIZE)) * SIZE + Math.floor((i % (4 * SIZE)) / 4)] += fine[4 * i + 3] > 127 ? 1 : 0;
  }
  return levels;
}

/** A digit as a picture. */
function paint(context, levels, size) {
  context.clearRect(0, 0, size, size);
  context.fillStyle = "#000";
  const step = size / SIZE;
  levels.forEach((level, i) => {
    context.globalAlpha = level / 16;
    context.fillRect((i % SIZE) * step, Math.floor(i / SIZE) * step, step, step);
  });
  context.globalAlpha = 1;
}

const exitName = (k) => (k === state.model.exits.length - 1 ? "the last exit, the original's head" : `exit ${k}`);
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

/** Milliseconds of leaving early and of the whole original, measured in turn. */
async function timed(input) {
  const { model } = state;
  const closed = model.exits.slice(1).map(() => Infinity);
  const times = [[], []];
  for (let run = -3; run < RUNS; run++) {
    for (const [i, thresholds] of [undefined, closed].entries()) {
      const start = performance.now();
      await model.run(input, thresholds);
      if (run >= 0) times[i].push(performance.now() - start);
    }
  }
  return times.map(median);
}

/** Ask the file about the digit on the pad and about all pictures; what comes while it runs is asked after it. */
async function ask() {
  state.stale = true;
  if (state.busy) return;
  state.busy = true;
  at("live").setAttribute("aria-busy", true);
  try {
    while (state.stale) {
      state.stale = false;
      await answer();
    }
  } catch (error) {
    at("status").textContent = `The file cannot run: ${error.message}`;
  } finally {
    state.busy = false;
    at("live").setAttribute("aria-busy", false);
  }
}

async function answer() {
  const { model, pictures, shown } = state;
  const all = await model.run(batch(pictures));
  all.exitIndex.forEach((k, i) => (at("pictures").children[i].lastChild.textContent = k));
  const counts = model.exits.map((_, k) => all.exitIndex.filter((exit) => exit === k).length);
  at("shares").textContent = `Of ${pictures.length} pictures leave: ${counts.map((n, k) => `${n} at ${exitName(k)}`).join(", ")}.`;
  at("answer").textContent = at("cost").textContent = "";
  if (!shown) return;
  const input = batch([shown]);
  const { logits, exitIndex, score, macs } = await model.run(input);
  const scores = Array.from(logits.data);
  const digit = scores.indexOf(Math.max(...scores));
  const full = model.about.trunk_macs.at(-1);
  const certain = Number.isNaN(score[0]) ? "" : `, score ${score[0].toFixed(3)}`;
  const [own, whole] = await timed(input);
  at("answer").textContent = `${model.labels?.[digit] ?? digit}, at ${exitName(exitIndex[0])}${certain}`;
  at("answer").dataset.exit = exitIndex[0];
  at("cost").textContent =
    `${((100 * macs[0]) / full).toFixed(1)}% of the original's MACs; ${own.toFixed(2)} ms, all exits closed ${whole.toFixed(2)} ms`;
}

function show(levels, picture) {
  state.shown = levels;
  for (const [i, button] of [...at("pictures").children].entries()) button.setAttribute("aria-pressed", i === picture);
  return ask();
}

/** Thresholds into the sliders; right of 1, a threshold closes its exit. */
function setSliders(thresholds) {
  [...at("thresholds").querySelectorAll("input")].forEach((slider, k) => {
    slider.value = Number.isFinite(thresholds[k]) ? thresholds[k] : 1.01;
    slider.nextElementSibling.textContent = thresholds[k] > 1 ? "closed" : thresholds[k].toFixed(3);
  });
}

function buildSliders() {
  const { model } = state;
  for (let k = 0; k < model.exits.length - 1; k++) {
    const [line, label, slider] = ["p", "label", "input"].map((tag) => document.createElement(tag));
    Object.assign(slider, { type: "range", min: 0, max: 1.01, step: 0.001, id: `threshold${k}` });
    label.append(`Threshold of exit ${k} (${model.exits[k]}) `, slider, document.createElement("output"));
    line.append(label);
    at("thresholds").append(line);
    slider.addEventListener("input", () => {
      const sliders = [...at("thresholds").querySelectorAll("input")];
      setSliders(model.operate({ thresholds: sliders.map(({ value }) => (value > 1 ? Infinity : Number(value))) }));
      at("chosen").textContent = "set by hand";
      ask();
    });
  }
  const point = at("point");
  const choose = () => {
    const { thresholds, macs_fraction, expected_accuracy, samples } = model.points[point.value];
    setSliders(model.operate({ thresholds }));
    at("chosen").textContent = `${(100 * macs_fraction).toFixed(1)}% of the MACs, `
      + `${(100 * expected_accuracy).toFixed(2)}% expected accuracy (${samples} samples)`;
    ask();
  };
  point.max = model.points.length - 1;
  point.addEventListener("input", choose);
  const own = model.operate().join();
  point.value = Math.max(0, model.points.findIndex(({ thresholds }) => thresholds.join() === own));
  choose();
}

function buildPictures(levels) {
  state.pictures = levels;
  for (const [i, digit] of levels.entries()) {
    const [button, picture, exit] = ["button", "canvas", "span"].map((tag) => document.createElement(tag));
    picture.width = picture.height = SIZE * 4;
    paint(picture.getContext("2d"), digit, SIZE * 4);
    button.append(picture, exit);
    button.addEventListener("click", () => {
      paint(ink, digit, pad.width);
      show(digit, i);
    });
    at("pictures").append(button);
  }
}

/** A picture of a digit from a file: what differs from its border is ink. */
async function drop(file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = pad;
  const scale = Math.min(width / bitmap.width, height / bitmap.height);
  ink.clearRect(0, 0, width, height);
  ink.drawImage(bitmap, 0, 0, bitmap.width * scale, bitmap.height * scale);
  const image = ink.getImageData(0, 0, width, height);
  const light = (i) => ((image.data[i] + image.data[i + 1] + image.data[i + 2]) / 3) * (image.data[i + 3] / 255);
  const border = light(0);
  for (let i = 0; i < image.data.length; i += 4) {
    image.data[i + 3] = image.data[i + 3] && Math.abs(light(i) - border) > 96 ? 255 : 0;
  }
  ink.putImageData(image, 0, 0);
  await show(drawn());
}

function listen() {
  let from = null;
  const place = ({ clientX, clientY }) => {
    const box = pad.getBoundingClientRect();
    return [clientX - box.left, clientY - box.top];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (at("pictures").querySelector('[aria-pressed="true"]')) at("clear").click();
    from = place(event);
    pad.setPointerCapture(event.pointerId);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!from) return;
    const to = place(event);
    Object.assign(ink, { lineWidth: pad.width / 9, lineCap: "round", strokeStyle: "#000" });
    ink.beginPath();
    ink.moveTo(...from);
    ink.lineTo(...(from = to));
    ink.stroke();
  });
  pad.addEventListener("pointerup", () => {
    from = null;
    show(drawn());
  });
  at("clear").addEventListener("click", () => {
    ink.clearRect(0, 0, pad.width, pad.height);
    show(null);
  });
  at("file").addEventListener("change", ({ target }) => target.files.length && read(target.files[0]));
  pad.addEventListener("dragover", (event) => event.preventDefault());
  pad.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) read(event.dataTransfer.files[0]);
  });
}

const read = (file) => drop(file).catch(() => (at("status").textContent = "That is no picture this browser can read."));

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response;
}

async function start() {
  let ort;
  try {
    ort = await import("./ort/ort.wasm.min.mjs");
  } catch {
    at("status").textContent = "The runtime is not here: run `make live` in a checkout, as said below.";
    return;
  }
  ort.env.wasm.numThreads = 1;
  state.Tensor = ort.Tensor;
  state.model = await load(ort, await (await fetched("model.onnx")).arrayBuffer(), { executionProviders: ["wasm"] });
  buildPictures((await (await fetched("pictures.json")).json()).ink);
  listen();
  at("live").hidden = false;
  buildSliders();
  at("pictures").firstChild.click();
  at("status").textContent = "";
}

start().catch((error) => (at("status").textContent = `The page cannot start: ${error.message}`));
