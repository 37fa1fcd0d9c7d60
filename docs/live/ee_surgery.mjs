/**
 * Run an exported file in Node or a browser: load it, run it, move the thresholds, read its frontier.
 *
 *     import * as ort from "onnxruntime-web"; // or "onnxruntime-node"
 *     const model = await load(ort, await (await fetch("model.onnx")).arrayBuffer());
 *     model.operate({ budget: 0.8 });
 *     const { logits, exitIndex, macs } = await model.run(new ort.Tensor("float32", pixels, [2, 3, 224, 224]));
 */

const FORMAT_VERSION = 1;
const LIMIT = 4 << 20; // characters of metadata
const text = (bytes) => new TextDecoder().decode(bytes);

/** A file that is none of ours, or a request that it cannot meet. */
export class OnnxError extends Error {}

/**
 * Load a file that `branched.export` wrote.
 *
 * @param ort onnxruntime-web or onnxruntime-node, as imported.
 * @param data the file: ArrayBuffer or Uint8Array; it is copied.
 * @param options of `InferenceSession.create`, such as `{ executionProviders: ["wasm"] }`.
 */
export async function load(ort, data, options = {}) {
  const { InferenceSession, Tensor } = ort.default ?? ort;
  const bytes = new Uint8Array(data).slice();
  const about = readAbout(bytes);
  const session = await InferenceSession.create(bytes, { logSeverityLevel: 3, ...options });
  return new Model(session, Tensor, about);
}

class Model {
  /** @type {number[] | null} Thresholds in force; null: those that the model was exported with. */
  thresholds = null;

  constructor(session, Tensor, about) {
    Object.assign(this, { session, Tensor, about, exits: about.exits, labels: about.labels, points: about.points });
    this.inputs = session.inputNames.filter((name) => name !== "thresholds");
  }

  /**
   * Set when samples leave, by one of: `budget`, the most accurate point of the frontier within this fraction of the
   * original's MACs; `latencyMs`, within this mean time of a batch; `maxAccuracyDrop`, the cheapest within this drop;
   * `thresholds`, one per branch, where Infinity closes an exit. Without any: the file's own operating point. Returns the thresholds in force.
   */
  operate({ budget, latencyMs, maxAccuracyDrop, thresholds } = {}) {
    const given = [budget, latencyMs, maxAccuracyDrop, thresholds].filter((value) => value !== undefined);
    if (given.length > 1) throw new OnnxError("Give one of budget, latencyMs, maxAccuracyDrop, thresholds.");
    if (thresholds !== undefined) return (this.thresholds = this.#checked(thresholds));
    if (!given.length) return (this.thresholds = null) ?? this.about.thresholds;
    const least = this.about.base_accuracy - maxAccuracyDrop - 1e-12;
    const found = maxAccuracyDrop !== undefined // points go from cheap to dear, each more accurate
      ? this.points.find((p) => p.expected_accuracy >= least)
      : this.points.findLast((p) => (budget === undefined ? p.latency_ms <= latencyMs : p.macs_fraction <= budget));
    if (!found) throw new OnnxError("No operating point of the file meets that; see `points`.");
    return (this.thresholds = found.thresholds);
  }

  /**
   * Run a batch: where each sample left, with what answer, at what cost.
   *
   * @param inputs a tensor for the original's one input, or tensors by name.
   * @param thresholds for this call alone.
   * @returns logits (a tensor (B, C)), and arrays of B numbers: exitIndex (the last is the original's own head), score
   *     (NaN at the original's head), macs.
   */
  async run(inputs, thresholds = this.thresholds ?? this.about.thresholds) {
    const named = inputs instanceof this.Tensor ? { [this.inputs[0]]: inputs } : inputs;
    const taus = Float32Array.from(this.#checked(thresholds));
    const given = { ...named, thresholds: new this.Tensor("float32", taus, [taus.length]) };
    const { logits, exit_index, score } = await this.session.run(given, ["logits", "exit_index", "score"]);
    const exitIndex = Array.from(exit_index.data, Number);
    const costs = this.#costs(thresholds);
    return { logits, exitIndex, score: Array.from(score.data), macs: exitIndex.map((k) => costs[k]) };
  }

  #checked(thresholds) {
    const found = Array.from(thresholds, Number);
    if (found.length === this.exits.length - 1 && !found.some(Number.isNaN)) return found;
    throw new OnnxError(`thresholds must be ${this.exits.length - 1} numbers, one per branch.`);
  }

  /** MACs of leaving at each exit: the trunk up to it and every branch visited. */
  #costs(thresholds) {
    const { trunk_macs, branch_macs, closes_alone } = this.about;
    const opened = Array.from(thresholds, (tau) => tau < Infinity);
    let paid = 0;
    return trunk_macs.map((trunk, k) => {
      if (k < opened.length && (closes_alone ? opened[k] : opened.slice(k).includes(true))) paid += branch_macs[k];
      return trunk + paid;
    });
  }
}

/**
 * The metadata, checked, since a file may come from anyone. The default of `thresholds` is renamed in `bytes`, so that the
 * input has none: where it has one, onnxruntime-node ignores what is given for it, and onnxruntime-web refuses it.
 */
function readAbout(bytes) {
  let about;
  try {
    const entries = [...fields(bytes)].filter((field) => field.number === 14).map(({ body }) => [...fields(body)]);
    const ours = entries.find((entry) => text(part(entry, 1)) === "ee_surgery");
    if (ours && part(ours, 2).length <= LIMIT) about = checked(JSON.parse(text(part(ours, 2))));
    const graph = [...fields(bytes)].filter((field) => field.number === 7).flatMap(({ body }) => [...fields(body)]);
    const names = graph.filter((field) => field.number === 5).map(({ body }) => part([...fields(body)], 8));
    names.find((name) => text(name) === "thresholds")?.set([0x5f], 9); // threshold_
  } catch (error) {
    throw error instanceof OnnxError ? error : new OnnxError(`The file is damaged: ${String(error).slice(0, 200)}`);
  }
  if (!about) throw new OnnxError("The file was not written by ee_surgery: it has no metadata 'ee_surgery'.");
  return about;
}

function checked(about) {
  if (about.format_version !== FORMAT_VERSION) throw new OnnxError(`The file is not of format ${FORMAT_VERSION}.`);
  const number = (value) => {
    const found = { inf: Infinity, "-inf": -Infinity }[value] ?? value ?? NaN;
    if (typeof found !== "number") throw new TypeError("not a number");
    return found;
  };
  const k = about.exits.length;
  const numbers = (values, count) => {
    if (values.length !== count) throw new TypeError("its parts do not fit together");
    return values.map(number);
  };
  return {
    ...about,
    exits: about.exits.map(String),
    labels: about.labels?.map(String) ?? null,
    trunk_macs: numbers(about.trunk_macs, k),
    branch_macs: numbers(about.branch_macs, k - 1),
    thresholds: numbers(about.thresholds, k - 1),
    base_accuracy: number(about.base_accuracy),
    points: about.points.map((point) => ({
      thresholds: numbers(point.thresholds, k - 1),
      accuracy: number(point.accuracy),
      expected_accuracy: number(point.expected_accuracy),
      macs_fraction: number(point.macs_fraction),
      latency_ms: number(point.latency_ms),
      samples: number(point.samples),
    })),
  };
}

const part = (entry, number) => entry.find((field) => field.number === number)?.body ?? new Uint8Array();

/** The fields of a protobuf message: number and, where it has a length, the body as a view of the bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; at < bytes.length && scale < 2 ** 70; scale *= 128) {
      value += (bytes[at] & 127) * scale;
      if (bytes[at++] < 128) return value;
    }
    throw new RangeError("a number has no end");
  };
  while (at < bytes.length) {
    const tag = varint();
    const wire = tag % 8;
    const size = wire === 2 ? varint() : { 1: 8, 5: 4 }[wire] ?? 0;
    if (wire === 0) varint();
    if (![0, 1, 2, 5].includes(wire) || at + size > bytes.length) throw new RangeError("no ONNX file");
    yield { number: Math.floor(tag / 8), body: bytes.subarray(at, (at += size)) };
  }
}
