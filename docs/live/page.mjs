/** The live page: pictures, sliders and what the file answers. The model itself is run by ee_surgery.mjs. */

import { load } from "./ee_surgery.mjs";
import { SIZE, listen, paint } from "./pad.mjs";

const [ROUNDS, CALLS] = [15, 8]; // a time is the median of the rounds; a browser's clock counts tenths of a millisecond
const at = (id) => document.getElementById(id);
const pad = at("pad");

const state = { model: null, Tensor: null, pictures: [], shown: null, busy: false, stale: false };

/** Digits as a batch, each of 64 levels of ink in 0..16. */
function batch(digits) {
  const pixels = Float32Array.from(digits.flat(), (level) => level / 8 - 1);
  return new state.Tensor("float32", pixels, [digits.length, 1, SIZE, SIZE]);
}

const exitName = (k) => (k === state.model.exits.length - 1 ? "the last exit, the original's head" : `exit ${k}`);
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

/** Milliseconds of leaving early and of the whole original, measured in turn. */
async function timed(input) {
  const { model } = state;
  const closed = model.exits.slice(1).map(() => Infinity);
  const times = [[], []];
  for (let round = -1; round < ROUNDS; round++) {
    for (const [i, thresholds] of [undefined, closed].entries()) {
      const start = performance.now();
      for (let call = 0; call < CALLS; call++) await model.run(input, thresholds);
      if (round >= 0) times[i].push((performance.now() - start) / CALLS);
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
  at("status").textContent = "";
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
    paint(picture, digit);
    button.append(picture, exit);
    button.addEventListener("click", () => {
      paint(pad, digit);
      show(digit, i);
    });
    at("pictures").append(button);
  }
}

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
  const clear = () => {
    paint(pad, []);
    show(null);
  };
  const take = listen(pad, {
    begins: () => at("pictures").querySelector('[aria-pressed="true"]') && clear(),
    shows: (digit) => show(digit),
    fails: () => (at("status").textContent = "That is no picture that this browser can read."),
  });
  at("clear").addEventListener("click", clear);
  at("file").addEventListener("change", ({ target }) => target.files.length && take(target.files[0]));
  at("live").hidden = false;
  buildSliders();
  at("pictures").firstChild.click();
}

start().catch((error) => (at("status").textContent = `The page cannot start: ${error.message}`));
