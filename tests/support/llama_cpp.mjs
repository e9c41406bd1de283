// Ask llama.cpp, through node-llama-cpp: a request as JSON on standard input, the answer as JSON in the file that it names.
// {package, answer, model, adapter?, texts, tokens, room}
// -> {texts: the tokens of each, probabilities: of what comes next, behind each of `tokens`, written: the likeliest tokens}
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { getLlama } = await import(pathToFileURL(asked.package).href);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: 1 });
const model = await llama.loadModel({ modelPath: asked.model });
const lora = asked.adapter ? { adapters: [{ filePath: asked.adapter }] } : undefined;
const context = await model.createContext({ contextSize: 256, batchSize: 256, lora });
const sequence = context.getSequence();

// At a temperature of 1 and with nothing cut off, these are the model's own probabilities.
const options = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const items = asked.tokens.map((token) => [token, { generateNext: { probabilities: true, options } }]);
const found = await sequence.controlledEvaluate(items);
const size = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
const probabilities = found.map(({ next }) =>
    Array.from({ length: size }, (_, token) => next.probabilities.get(token) ?? 0));

await sequence.clearHistory();
const written = [];
for await (const token of sequence.evaluate(asked.tokens, { temperature: 0 })) {
    written.push(token);
    if (written.length >= asked.room || model.isEogToken(token)) break;
}
const texts = asked.texts.map((text) => model.tokenize(text, true));
writeFileSync(asked.answer, JSON.stringify({ texts, probabilities, written }));
await llama.dispose();
process.exit(0);
