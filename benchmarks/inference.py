"""What packed linears cost at inference, beside bfloat16 and float32 ones in the same run.

    python benchmarks/inference.py [--threads 1] [--quick]

*layers*: one linear, decoding (one token) and prefill (256 tokens). Every way takes its turn before the next round,
each time with another copy of its weight, so that all see the same machine and no weight waits in a small cache. Times
are the best of all rounds, and with one thread the processor's, so that other work on the machine counts less.
*dependencies*: what other kernels for CPUs take for the same product, where installed; onnxruntime's accuracy level 4
rounds the inputs to 8 bits, torch's int4pack wants bfloat16 inputs and a layout of its own. *model*: a random LLaMA,
each way in a process of its own, which reports its peak memory too. Energy is read from RAPL where the machine has it;
otherwise it is an estimate, time times an assumed power, and says so. Where there is a GPU, the layers are measured on
it too and compared with what its memory could deliver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from swquant.checkpoint.quantized import Outline, Part, QuantizedModel
from swquant.checkpoint.writer import write_checkpoint
from swquant.formats.compressed_tensors import CompressedTensors
from swquant.quant.bits import pack
from swquant.quant.draft import commit, open_draft
from swquant.quant.spec import BITS, QuantSpec
from swquant.runtime.kernels import PackedWeight, kernel_for

RESULTS = Path(__file__).parent / "results" / "inference.json"
SHAPES = ((4096, 4096), (11008, 4096))
GROUP, PREFILL, COPIES = 64, 256, 4
CACHED = 1 << 28
"""Bytes of weights that are too many for any device's cache."""
WIDTH, INNER, LAYERS, VOCABULARY = 2048, 5632, 4, 2048
NEW_TOKENS = 24
ASSUMED_WATTS = 10.0
"""Of one busy core with its memory: a guess, used only where nothing measures."""

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
Way = Callable[[], object]

CHILD = """
import json, sys, time, torch
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would tell the parent's peak too
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3)
way, folder, threads, tokens, prompt = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
torch.set_num_threads(threads)
clock = time.thread_time if threads == 1 else time.perf_counter
if way == "nothing":
    import swquant.runtime
    from transformers import LlamaForCausalLM
    print(json.dumps({"peak_mb": peak()}))
    sys.exit()
if way in ("bfloat16", "float32"):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, way)).eval()
else:
    import swquant
    model = swquant.load(folder, device="cpu")
ids = torch.randint(2, 2048, (1, prompt), generator=torch.Generator().manual_seed(0))
model.generate(ids[:, :8], max_new_tokens=2, min_new_tokens=2, do_sample=False)
prefill, decode = [], []
with torch.inference_mode():
    for _ in range(3):
        start = clock(); out = model(ids, use_cache=True); prefill.append(clock() - start)
        cache, last = out.past_key_values, ids[:, -1:]
        for _ in range(tokens):
            start = clock(); out = model(last, past_key_values=cache, use_cache=True)
            decode.append(clock() - start)
            last = out.logits[:, -1:].argmax(-1)
print(json.dumps({"prefill_s": min(prefill), "decode_s": min(decode), "peak_mb": peak()}))
"""


def weight_of(bits: int, out: int, inputs: int, device: str = "cpu") -> PackedWeight:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (out, inputs), generator=rng, dtype=torch.uint8)
    zero = torch.randint(1 << bits, (inputs // GROUP, out), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(out, inputs // GROUP, generator=rng) * 0.02).bfloat16()
    words = torch.cat([pack(part, bits) for part in codes.split(512)])
    return PackedWeight(words.to(device), scale.to(device), pack(zero, bits).T.contiguous().to(device), bits, inputs)


def turns(ways: list[Way]) -> Way:
    """Call one after the other, one a call."""
    state = iter(range(1 << 60))
    return lambda: ways[next(state) % len(ways)]()


def best(ways: dict[str, Way], rounds: int, settle: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Seconds, the least of all rounds; every way has one turn a round, and one before the first."""
    clock = time.thread_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds + 1):
        for name, way in ways.items():
            settle()
            start = clock()
            way()
            settle()
            if count:
                found[name].append(clock() - start)
    return {name: min(times) for name, times in found.items()}


def packed_way(x: Tensor, weights: list[PackedWeight], kernel: str) -> Way:
    return turns([lambda weight=weight: kernel_for(kernel, x, weight).multiply(x, weight) for weight in weights])


def dense_way(x: Tensor, weights: list[Tensor]) -> Way:
    return turns([lambda weight=weight: linear(x, weight) for weight in weights])


def layer_rows(rounds: int) -> Iterator[dict[str, Any]]:
    for out, inputs in SHAPES:
        packed = {bits: weight_of(bits, out, inputs) for bits in BITS}
        many = {bits: [weight, *(copy_of(weight) for _ in range(COPIES - 1))] for bits, weight in packed.items()}
        wide = packed[4].dequantize(torch.float32)
        dense = {dtype: [wide.to(dtype, copy=True) for _ in range(COPIES)] for dtype in (torch.float32, torch.bfloat16)}
        for rows in (1, PREFILL):
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))
            ways = {str(dtype)[6:]: dense_way(x.to(dtype), dense[dtype]) for dtype in dense}
            for bits, weights in many.items():
                ways[f"packed {bits} bit"] = packed_way(x.bfloat16(), weights, "auto")
            plain = {
                f"packed {bits} bit, plain": packed_way(x.bfloat16(), weights[:1], "plain")
                for bits, weights in many.items()
            }
            few = max(1, rounds // 8)
            times = best(ways, rounds if rows == 1 else few) | best(plain, few)
            for way, seconds in times.items():
                row = {"outputs": out, "inputs": inputs, "tokens": rows, "way": way, "ms": round(seconds * 1e3, 2)}
                yield row | {"time / bfloat16": round(seconds / times["bfloat16"], 2)}


def copy_of(weight: PackedWeight) -> PackedWeight:
    zero = None if weight.zero is None else weight.zero.clone()
    return PackedWeight(weight.words.clone(), weight.scale.clone(), zero, weight.bits, weight.in_features)


def dependency_rows(rounds: int) -> Iterator[dict[str, Any]]:
    out, inputs = SHAPES[0]
    x = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0))
    narrow = x.bfloat16()
    dense = dense_way(narrow, [torch.randn(out, inputs).bfloat16() for _ in range(COPIES)])
    ways: dict[str, Way] = {"bfloat16": dense}
    for bits in BITS:
        weights = [weight_of(bits, out, inputs)]
        ways[f"packed {bits} bit"] = packed_way(
            narrow, weights + [copy_of(weights[0]) for _ in range(COPIES - 1)], "auto"
        )
    codes = torch.randint(16, (out, inputs), dtype=torch.int32)
    layouts = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(COPIES)]
    grid = torch.rand(inputs // GROUP, out, 2).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    ways["torch int4pack, 4 bit"] = turns([lambda w=w: multiply(narrow, w, GROUP, grid) for w in layouts])
    eights = [torch.randint(-128, 128, (out, inputs), dtype=torch.int8) for _ in range(COPIES)]
    scale = torch.rand(out).bfloat16()
    narrow_multiply = torch.ops.aten._weight_int8pack_mm
    ways["torch int8pack, 8 bit per channel"] = turns([lambda w=w: narrow_multiply(narrow, w, scale) for w in eights])
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        for bits in (2, 4, 8):
            for level in (0, 4):
                name = f"onnxruntime {bits} bit, accuracy level {level}"
                ways[name] = onnx_way(bits, out, inputs, level, torch.get_num_threads(), x)
    times = best(ways, rounds)
    for way, seconds in times.items():
        yield {"way": way, "ms": round(seconds * 1e3, 2), "time / bfloat16": round(seconds / times["bfloat16"], 2)}


def onnx_way(bits: int, out: int, inputs: int, level: int, threads: int, x: Tensor) -> Way:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    data = {
        "codes": rng.integers(0, 256, (out, inputs // GROUP, GROUP * bits // 8), dtype=np.uint8),
        "scales": rng.random((out, inputs // GROUP), dtype=np.float32),
        "zeros": rng.integers(0, 256, (out, inputs // GROUP * bits // 8), dtype=np.uint8),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *data],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=out,
        bits=bits,
        block_size=GROUP,
        accuracy_level=level,
    )
    places = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", inputs), ("y", out))
    ]
    graph = helper.make_graph(
        [node], "product", places[:1], places[1:], [numpy_helper.from_array(v, k) for k, v in data.items()]
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def write_models(folder: Path) -> dict[str, Path]:
    """A random LLaMA in bfloat16, and rounded to each width, tensor by tensor."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        max_position_embeddings=1024,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}

    def parts(spec: QuantSpec | None) -> Iterator[Part]:
        rng = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = (torch.randn(shape, generator=rng) * 0.02).bfloat16()
            quantized = spec is not None and name.endswith("_proj.weight")
            yield commit(open_draft({name: value}, (name,), spec)).quantized if quantized else {name: value}

    places = {"bfloat16": folder / "plain", "float32": folder / "plain"}
    write_checkpoint(folder / "plain", parts(None), config=config.to_dict())
    for bits in BITS:
        spec = QuantSpec(bits, GROUP, True)
        linears: dict[str, Any] = {name[:-7]: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        grids = dict.fromkeys(linears, spec)
        outline = Outline(folder, config.to_dict(), torch.bfloat16, linears, grids, ("lm_head",))
        places[f"packed {bits} bit"] = folder / str(bits)
        CompressedTensors().write(folder / str(bits), QuantizedModel(outline, lambda spec=spec: parts(spec)))
    return places


def model_rows(threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    def child(way: str, place: str) -> dict[str, float]:
        command = [sys.executable, "-c", CHILD, way, place, str(threads), str(NEW_TOKENS), str(PREFILL)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        places = write_models(Path(folder))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in places}
        joules: dict[str, float] = {}
        for _ in range(rounds):
            for way, place in places.items():
                before = energy()
                found[way].append(child(way, str(place)))
                joules[way] = energy() - before
        yield {"way": "nothing", **child("nothing", "")}
        for way, runs in found.items():
            decode, prefill = (min(run[key] for run in runs) for key in ("decode_s", "prefill_s"))
            size = sum(file.stat().st_size for file in places[way].glob("*.safetensors"))
            row = {"way": way, "file_mb": round(size / 1e6), "peak_mb": runs[0]["peak_mb"]}
            row |= {"decode_tokens_per_s": round(1 / decode, 2), "prefill_ms": round(prefill * 1e3, 1)}
            if joules[way]:
                yield row | {"joules_of_the_whole_process_rapl": round(joules[way], 1)}
            else:
                yield row | {"joules_per_token_estimate": round(decode * threads * ASSUMED_WATTS, 3)}


def energy() -> float:
    """Joules that the processor has counted, or 0 where it does not tell."""
    try:
        return int(RAPL.read_text()) / 1e6
    except OSError:
        return 0.0


def gpu_rows(
    rounds: int,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    copied_bytes: int = 1 << 30,
    tokens: Sequence[int] = (1, PREFILL),
) -> Iterator[dict[str, Any]]:
    """Products on a device against the time in which it copies as many bytes as the weight has.

    A product takes less time there than a call from Python, and a weight fits into the device's cache. So calls with
    weights of ``CACHED`` bytes together are recorded in a graph, as servers decode, and the graph is replayed;
    ``called_us`` is the time of one call that is waited for.
    """
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    per_second = copied_per_second(copied_bytes, rounds, device, settle)
    cached = min(CACHED, copied_bytes)
    for out, inputs in shapes:
        weights = {bits: weight_of(bits, out, inputs, str(device)) for bits in BITS}
        dense = weights[4].dequantize(torch.bfloat16)
        sizes = {f"packed {bits} bit": packed_bytes(weight) for bits, weight in weights.items()}
        sizes["bfloat16"] = dense.nbytes
        for rows in tokens:
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            calls: dict[str, list[Way]] = {
                "bfloat16": [partial(linear, x, dense.clone()) for _ in range(-(-cached // dense.nbytes))]
            }
            for bits, weight in weights.items():
                name = f"packed {bits} bit"
                many = [copy_of(weight) for _ in range(-(-cached // sizes[name]))]
                calls[name] = [partial(kernel_for("auto", x, one).multiply, x, one) for one in many]
            graphs = {name: recorded(ways, device) for name, ways in calls.items()}
            times = {name: took / len(calls[name]) for name, took in best(graphs, rounds, settle).items()}
            called = best({name: ways[0] for name, ways in calls.items()}, rounds, settle)
            for way, seconds in times.items():
                row = {"outputs": out, "inputs": inputs, "tokens": rows, "way": way, "us": round(seconds * 1e6, 2)}
                limit = sizes[way] / per_second
                yield row | {
                    "called_us": round(called[way] * 1e6, 1),
                    "time / bfloat16": round(seconds / times["bfloat16"], 3),
                    "limit_us": round(limit * 1e6, 2),
                    "limit / time": round(limit / seconds, 3),
                }


def copied_per_second(nbytes: int, rounds: int, device: torch.device, settle: Callable[[], None]) -> float:
    """Bytes that are read or written while ``nbytes`` are copied."""
    block = torch.empty(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(block)
    return 2 * block.nbytes / best({"copy": lambda: target.copy_(block)}, rounds, settle)["copy"]


def packed_bytes(weight: PackedWeight) -> int:
    return weight.words.nbytes + weight.scale.nbytes + (0 if weight.zero is None else weight.zero.nbytes)


def recorded(ways: list[Way], device: torch.device) -> Way:
    """All of them one after the other; on CUDA as a graph, which costs one launch."""
    for way in ways:
        way()
    if device.type != "cuda":
        return lambda: [way() for way in ways]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for way in ways:
            way()
    return graph.replay


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 1 if arguments.quick else 16
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": processor(),
        "threads": arguments.threads,
        "numba": importlib.util.find_spec("numba") is not None,
        "group_size": GROUP,
        "energy": "RAPL" if energy() else f"estimate: {ASSUMED_WATTS} W per busy core are assumed, not measured",
    }
    with torch.inference_mode():
        sections: dict[str, Iterator[dict[str, Any]]] = {
            "layers": layer_rows(rounds),
            "dependencies": dependency_rows(rounds),
            "model": model_rows(arguments.threads, 1 if arguments.quick else 2),
        }
        if torch.cuda.is_available():
            sections["gpu"] = gpu_rows(rounds, torch.device("cuda"))
        for name, rows in sections.items():
            result[name] = []
            for row in rows:
                result[name].append(row)
                print(name, json.dumps(row), flush=True)
    if not arguments.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
