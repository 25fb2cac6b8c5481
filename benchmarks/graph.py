"""What ONNX costs: merged beside base, READ beside its backbone, and how much memory making and loading a graph takes.

    python benchmarks/graph.py latency      base, merged and READ graphs in onnxruntime, and their nodes
    python benchmarks/graph.py export       600 M values: peak memory, bytes beside the weights; PyTorch's own exporter
    python benchmarks/graph.py load         600 M values in bf16: seconds and peak memory until the first answer

Sessions take turns call by call, in an order that changes every round. Memory is the peak resident set of a process
of its own; what its imports alone take is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from step import ratio

import surgery

SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12,
         "num_key_value_heads": 12, "vocab_size": 32000}  # fmt: skip
LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 12,
         "num_key_value_heads": 12, "vocab_size": 32000}  # fmt: skip


def build(folder: Path, shape: dict[str, int], dtype: torch.dtype) -> Path:
    """A Llama of random weights, once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not folder.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).to(dtype).save_pretrained(folder)
    return folder


def adapter(base: Path, out: Path, spec: Any) -> Path:
    """An adapter whose values moved."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    surgery.attach(model, spec)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    surgery.save(model, out, base=base, overwrite=True)
    return out


def measure_latency(arguments: argparse.Namespace) -> None:
    """A forward of 8 x 128 tokens without a cache, and a step of 8 with 128 cached.

    The base is loaded twice, which shows how much two sessions on one file differ.
    """
    folder: Path = arguments.folder
    base = build(folder / "small", SMALL, torch.float32)
    surgery.export_checkpoint(base, folder / "base", overwrite=True)
    surgery.export(adapter(base, folder / "paca", surgery.PacaSpec(rank=16)), folder / "merged", format="onnx",
                   overwrite=True)  # fmt: skip
    surgery.export(adapter(base, folder / "read", surgery.ReadSpec(hidden=64)), folder / "side", format="onnx",
                   overwrite=True)  # fmt: skip
    names = ("base", "merged", "side")
    same = (folder / "base" / "model.onnx").read_bytes() == (folder / "merged" / "model.onnx").read_bytes()
    print(f"model.onnx of merged and base: {'the same bytes' if same else 'other bytes'}")
    sessions = {"first": session(folder / "base" / "model.onnx")}
    sessions |= {name: session(folder / name / "model.onnx", folder / f"{name}.optimized.onnx") for name in names}
    for name in names:
        plain, optimized = (
            len(onnx.load(path, load_external_data=False).graph.node)
            for path in (folder / name / "model.onnx", folder / f"{name}.optimized.onnx")
        )
        print(f"{name:7} {plain} nodes, {optimized} as onnxruntime runs it")
    for title, tokens, past, rounds in (("prefill 8 x 128", 128, 0, 1), ("one token, 128 cached", 1, 128, 20)):
        calls = {name: caller(each, 8, tokens, past) for name, each in sessions.items()}
        seconds = take_turns(calls, rounds * arguments.rounds)
        for name in sessions:
            median, to_base = statistics.median(seconds[name]), ratio(seconds[name], seconds["base"])
            print(f"{title}: {name:7} {median:.4f} s, to base {to_base}")


def session(path: Path, optimized: Path | None = None) -> Any:
    """An onnxruntime session on one thread: two would wait for each other, and for other guests of the machine.

    optimized: where to write the graph that it makes.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", optimized.name + "_data"
        )
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def caller(runner: Any, batch: int, tokens: int, past: int) -> Callable[[], Any]:
    """One call of a decoder's graph with so many cached tokens."""
    ids = np.random.default_rng(0).integers(5, 30000, (batch, tokens))
    feed = {
        "input_ids": ids, "attention_mask": np.ones((batch, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }  # fmt: skip
    for value in runner.get_inputs():
        if value.name.startswith("past"):
            feed[value.name] = np.zeros((batch, value.shape[1], past, value.shape[3]), np.float32)
    return lambda: runner.run(["logits"], feed)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call by name, interleaved, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for number in range(rounds + 2):
        for name in order.sample(list(calls), len(calls)):
            started = time.perf_counter()
            calls[name]()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


# --- memory


def measure_export(arguments: argparse.Namespace) -> None:
    """Ours and PyTorch's exporter, each in a process of its own."""
    base = build(arguments.folder / "large", LARGE, torch.float32)
    print(f"{sum(path.stat().st_size for path in base.glob('*.safetensors')) // 4:,} values in fp32")
    for way in ("imports", "surgery", "torch"):
        result = in_process("export", way, arguments)
        peak, seconds = result["peak"] / 1e6, result["seconds"]
        print(f"{way:8} peak {peak:.0f} MB, {seconds:.0f} s, {result['written']:,} bytes beside the weights")


def measure_load(arguments: argparse.Namespace) -> None:
    """A graph on the safetensors file, one on a copy, and both with products of transposed weights instead."""
    base = build(arguments.folder / "large-bf16", LARGE, torch.bfloat16)
    for name, data in (("zero-copy", "safetensors"), ("copied", "copy")):
        out = arguments.folder / name
        surgery.export_checkpoint(base, out, check=False, onnx_data=data, overwrite=True)
        unfuse(out / "model.onnx", out / "unfused.onnx")
    ways = ("imports", *(f"{data}/{way}.onnx" for data in ("zero-copy", "copied") for way in ("model", "unfused")))
    for way in ways:
        runs = [in_process("load", way, arguments) for _ in range(1 if way == "imports" else arguments.rounds)]
        seconds = [run["seconds"] for run in runs]
        print(f"{way:22} peak {statistics.median(run['peak'] for run in runs) / 1e6:.0f} MB, "
              f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")  # fmt: skip


def unfuse(path: Path, out: Path) -> None:
    """Replace the export's FusedMatMul(x, w, transB) by MatMul(x, Transpose(w)), as exporters write it."""
    model = onnx.load(path, load_external_data=False)
    nodes: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if node.op_type != "FusedMatMul":
            nodes[node.output[0]] = node
            continue
        turned = f"{node.input[1]}.transposed"
        nodes.setdefault(turned, onnx.helper.make_node("Transpose", [node.input[1]], [turned], perm=[1, 0]))
        nodes[node.output[0]] = onnx.helper.make_node("MatMul", [node.input[0], turned], list(node.output))
    del model.graph.node[:]
    model.graph.node.extend(nodes.values())
    out.write_bytes(model.SerializeToString())


def in_process(kind: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `child` prints, of a process of its own."""
    command = [sys.executable, __file__, kind, "--folder", str(arguments.folder), "--child", way]
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return result


def child(arguments: argparse.Namespace) -> None:
    """One way, and its peak memory."""
    folder, way = arguments.folder, arguments.child
    started, written = time.perf_counter(), 0
    if arguments.kind == "load" and way != "imports":
        caller(session(folder / way), 1, 8, 0)()
    elif way == "surgery":
        surgery.export_checkpoint(folder / "large", folder / "out", check=False, overwrite=True)
        written = sum(p.stat().st_size for p in (folder / "out").iterdir() if p.suffix != ".safetensors")
    elif way == "torch":
        written = export_by_torch(folder / "large", folder / "out-torch")
    else:
        from exporters import onnx_export  # noqa: F401  its imports are what is measured
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - started, "written": written}))


def export_by_torch(base: Path, out: Path) -> int:
    """PyTorch's exporter on the loaded model, without a cache, weights beside the graph. Returns bytes written."""
    from transformers import AutoModelForCausalLM

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.config.use_cache = False
    given = {"input_ids": torch.ones((2, 8), dtype=torch.long), "use_cache": False}
    with torch.no_grad():
        torch.onnx.export(
            model, (), str(out / "model.onnx"), kwargs=given, dynamo=True, external_data=True, verbose=False
        )
    return sum(path.stat().st_size for path in out.iterdir())


KINDS = {"latency": measure_latency, "export": measure_export, "load": measure_load}


def main() -> None:
    """Measure one kind of thing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--folder", type=Path, default=Path("build/graph"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{arguments.kind}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    KINDS[arguments.kind](arguments)


if __name__ == "__main__":
    main()
