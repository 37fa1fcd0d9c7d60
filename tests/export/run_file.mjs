/** Run cases of an exported file: node run_file.mjs NODE_MODULES RUNTIME FILE < cases; answers are JSON on the output. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";

import { load, OnnxError } from "../../docs/live/ee_surgery.mjs";

const [modules, runtime, file] = process.argv.slice(2);
const ort = createRequire(resolve(modules, "_"))(runtime);
const { cases, pixels, dims } = JSON.parse(readFileSync(0, "utf8"));
const all = new Float32Array(Uint8Array.from(Buffer.from(pixels, "base64")).buffer);
const size = all.length / dims[0];
const number = (value) => Number(String(value).replace("inf", "Infinity"));
const bytes = readFileSync(file);

let model, bare;
try {
  model = await load(ort, bytes);
  bare = await ort.InferenceSession.create(new Uint8Array(bytes), { logSeverityLevel: 3 });
} catch (error) {
  if (!(error instanceof OnnxError)) throw error;
  process.stdout.write(JSON.stringify({ error: error.message }));
  process.exit(0);
}

const answers = [];
for (const { batch, thresholds, request, withModule } of cases) {
  const x = new ort.Tensor("float32", all.slice(0, batch * size), [batch, ...dims.slice(1)]);
  const taus = thresholds?.map(number);
  if (withModule) {
    model.operate(request ?? (taus ? { thresholds: taus } : {}));
    const { logits, exitIndex, score, macs } = await model.run(x);
    answers.push({ logits: Array.from(logits.data), exitIndex, score: score.map(String), macs });
  } else {
    // the file as it is, at its own operating point
    const { logits, exit_index, score } = await bare.run({ [model.inputs[0]]: x });
    const exitIndex = Array.from(exit_index.data, Number);
    answers.push({ logits: Array.from(logits.data), exitIndex, score: Array.from(score.data, String) });
  }
}
process.stdout.write(JSON.stringify({ exits: model.exits, points: model.points.length, answers }));
