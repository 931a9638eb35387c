// Answers one job, read as JSON from standard input, with a prebuilt llama.cpp. See node_llama_cpp.py.
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const job = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: job.threads,
    logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: job.model});
const answer = {};

async function contextOf(size) {
    const context = await model.createContext({contextSize: size, batchSize: size, threads: job.threads});
    return context.getSequence();
}

function logProbability(logits, token) {
    const highest = [...logits.values()].reduce((a, b) => Math.max(a, b));
    let sum = 0;
    for (const value of logits.values())
        sum += Math.exp(value - highest);
    return logits.get(token) - highest - Math.log(sum);
}

async function logProbabilities(sequence, window) {
    await sequence.clearHistory();
    const wanted = {generateNext: {logits: true}};
    const outputs = await sequence.controlledEvaluate(window.map((token) => [token, wanted]));
    return window.slice(1).map((token, index) => logProbability(outputs[index].next.logits, token));
}

async function tokensPerSecond(sequence, prompt, count) {
    await sequence.clearHistory();
    let start = 0, made = 0;
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (made === 0)
            start = performance.now();
        else if (made === count)
            break;
        made++;
    }
    return count / ((performance.now() - start) / 1000);
}

if (job.texts)
    answer.tokens = job.texts.map((text) => [...model.tokenize(text, true)]);
if (job.windows) {
    const sequence = await contextOf(Math.max(...job.windows.map((window) => window.length)));
    answer.logProbabilities = [];
    for (const window of job.windows)
        answer.logProbabilities.push(await logProbabilities(sequence, window));
}
if (job.speed) {
    const {prompt, tokens, repeats} = job.speed;
    const sequence = await contextOf(prompt.length + tokens + 8);
    answer.tokensPerSecond = [];
    for (let index = 0; index < repeats; index++)
        answer.tokensPerSecond.push(await tokensPerSecond(sequence, prompt, tokens));
}
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
