"""The ONNX graphs of a folder that holds a checkpoint: made, held against torch, and recorded."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import psutil
import safetensors.torch
import torch
from torch import Tensor

from exporters.dense import KEEP
from exporters.onnx_check import TOLERANCES, WINDOW_LIMIT, run_cases, unpassed_window
from exporters.onnx_graph import MAX_OPSET, MIN_OPSET, build_model, describe, trace
from exporters.onnx_side import for_graph
from exporters.onnx_weights import DATA_FILE, attach, find_sources, write_data
from surgery.adapter import Adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint, read_json
from surgery.delta import SideDelta, require_side
from surgery.errors import CheckError, RequestError, counted, shorten
from surgery.exported import load_merged
from surgery.manifest import ONNX, Check, Record, parse_record, read_document
from surgery.operate import attach_plan, load_base_model
from surgery.plan import SurgeryPlan
from surgery.survey import own_task, read_config
from surgery.tensorfile import TensorInfo, file_sha256, header_sha256, read_header, torch_dtype
from surgery.verify_bytes import bits_of
from surgery.writing import replace_file, write_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DATA = ("auto", "safetensors", "copy")
GENAI_FILE, SIDE_FILE = "genai_config.json", "read.safetensors"
STAND_IN = "fp32_"  # before the names of graphs that are checked in place of bf16 ones
CHECK_BYTES_FACTOR = 3  # torch's model, onnxruntime's, and what loading needs: times the weights as computed in


@dataclass(frozen=True)
class OnnxOptions:
    """What a graph is to be.

    opset: of ONNX's own operators; data: where the weights lie (auto: in the safetensors files, where they lie there
    as they are in memory); dtype: what it computes in (keep: fp16 where all weights are fp16, else fp32).
    Raises: RequestError.
    """

    opset: int = MIN_OPSET
    data: str = "auto"
    dtype: str = KEEP

    def __post_init__(self) -> None:
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise RequestError("--opset", str(self.opset), expected=f"{MIN_OPSET} to {MAX_OPSET}")
        if self.data not in DATA:
            raise RequestError("--onnx-data", repr(self.data), expected=f"one of {', '.join(DATA)}")
        if self.dtype not in (KEEP, *DTYPES):
            raise RequestError("--dtype", repr(self.dtype), expected=f"{KEEP}, {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Graphs:
    """The graphs' files in a folder, where their data is, and what users must know."""

    files: tuple[str, ...]
    data: str
    notes: tuple[str, ...] = ()


def add_graphs(folder: Path, options: OnnxOptions, delta: Any, *, is_checked: bool) -> None:
    """Put graphs into a folder that has all else, hold them against torch, and record it.

    delta: the adapter's, None for a plain checkpoint. Raises: UnsupportedError, RequestError, CheckError.
    """
    record = parse_record(read_document(folder), str(folder / RECORD_FILE))
    dtype = _computing_dtype(folder, options.dtype)
    graphs = write_graphs(folder, _skeleton(folder, record.plan, delta, dtype), dtype, options)
    config = read_config(folder)
    if own_task(config) == "causal-lm" and hasattr(config.get_text_config(), "max_position_embeddings"):
        write_file(folder / GENAI_FILE, json.dumps(genai_config(folder), indent=2) + "\n")
    outcome = Check(ONNX, "not run", "--no-verify")
    differences: dict[str, float] = {}
    if is_checked:
        files = {name: name for name in graphs.files}
        if dtype == torch.bfloat16:  # onnxruntime's CPU has no kernels for it
            model = _skeleton(folder, record.plan, delta, torch.float32)
            stand_ins = write_graphs(folder, model, torch.float32, options, prefix=STAND_IN).files
            files = dict(zip(graphs.files, stand_ins, strict=True))
        outcome, differences = check_folder(folder, record, dtype, files)
        for name in set(files.values()) - set(graphs.files):
            (folder / name).unlink()
    described = {
        "opset": options.opset, "dtype": _name(dtype), "asked_dtype": options.dtype, "data": graphs.data,
        "differences": differences,
        "graphs": {name: file_sha256(folder / name) for name in graphs.files},
        "copies": {DATA_FILE: file_sha256(folder / DATA_FILE)} if graphs.data == "copy" else {},
        "headers": header_digests(folder),
    }  # fmt: skip
    exported = {**record.manifest.export, "format": ONNX, ONNX: described}
    exported["notes"] = (*record.manifest.export.get("notes", ()), *graphs.notes)
    manifest = replace(record.manifest, export=exported, checks=(*record.manifest.checks, outcome))
    replace_file(folder / RECORD_FILE, replace(record, manifest=manifest).to_json())


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def _computing_dtype(folder: Path, wanted: str) -> torch.dtype:
    if wanted != KEEP:
        return DTYPES[wanted]
    kinds = {info.dtype for info in Checkpoint.open(folder).values()}
    return torch.float16 if kinds == {"F16"} else torch.float32


def _skeleton(folder: Path, plan: SurgeryPlan, delta: Any, dtype: torch.dtype) -> Any:
    """A folder's model with sizes and no values, and its side network if it has one."""

    def attach_side(model: Any) -> None:
        attach_plan(model, plan, delta)
        for_graph(model)

    attach = attach_side if isinstance(delta, SideDelta) else None
    return build_model(read_config(folder), dtype, attach, stored=[info.name for info in _stored(folder)])


def _stored(folder: Path) -> list[TensorInfo]:
    """The tensors of a folder's files. Of two of one name the trained head comes last."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: (path.name == SIDE_FILE, path.name))
    return [info for path in files for info in read_header(path).tensors]


def write_graphs(folder: Path, model: Any, dtype: torch.dtype, options: OnnxOptions, *, prefix: str = "") -> Graphs:
    """Write the graphs of a model beside the safetensors files that hold its weights.

    model: of `build_model`; prefix: before the graphs' names. Raises: UnsupportedError, RequestError, CheckError.
    """
    sources = find_sources(model, _stored(folder))
    missing = [name for name, _ in model.named_parameters() if name not in sources]
    notes = []
    if missing:
        found = f"{missing[0]} and others ({len(missing)}) lie on disk in another form than in memory"
        if options.data == "safetensors":
            raise RequestError("--onnx-data safetensors", found, expected="the same form", fix="Use --onnx-data copy")
        notes.append(f"{DATA_FILE} holds the weights once more: {found}")
    is_copy = bool(missing) or options.data == "copy"
    if is_copy:
        loaded = dict(load_merged(folder).named_parameters()) if missing else {}
        sources = write_data(folder, sources, {name: loaded[name].detach() for name in missing})
    specs = describe(model, dtype)
    for spec in specs:
        graph = trace(spec, options.opset)
        attach(graph, sources, folder)
        _save(graph, folder / f"{prefix}{spec.file}")
    return Graphs(tuple(f"{prefix}{spec.file}" for spec in specs), "copy" if is_copy else "safetensors", tuple(notes))


def _save(graph: ir.Model, path: Path) -> None:
    """Write a graph, whose data lies elsewhere, and have it checked in full. Raises: CheckError."""
    ir.save(graph, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        why = shorten(str(error).strip().splitlines()[0], 200)
        opset = graph.opset_imports[""]
        fix = f"Later operators take more types: --opset {MAX_OPSET}" if opset and opset < MAX_OPSET else ""
        found = f"onnx.checker refuses it at opset {opset} ({why})"
        raise CheckError(path.name, found, expected="a valid model", fix=fix) from error


# --- checks


def check_folder(
    folder: Path, record: Record, dtype: torch.dtype, files: dict[str, str]
) -> tuple[Check, dict[str, float]]:
    """onnxruntime against torch. files: what to run for each graph. Returns the outcome and each case's difference.

    Raises: CheckError.
    """
    kind = torch.float32 if dtype == torch.bfloat16 else dtype
    needed = sum(info.size_bytes // _width(info.dtype) for info in Checkpoint.open(folder).values())
    needed *= kind.itemsize * CHECK_BYTES_FACTOR
    free = psutil.virtual_memory().available
    if needed > free:
        return Check(ONNX, "not run", f"needs {needed:,} bytes of memory, {free:,} are free"), {}
    found = {case.name: case.difference for case in run_cases(folder, _reference(folder, record, kind), kind, files)}
    gc.collect()
    worst = max(found.values())
    said = f"differs from torch by at most {worst:.1g} of the outputs' range ({len(found)} cases, {_name(kind)})"
    said += f"; tolerance {TOLERANCES[kind]:g}"
    if kind != dtype:
        said += f"; a graph in {_name(kind)} ran in its place, as onnxruntime's CPU does not compute in {_name(dtype)}"
    if window := unpassed_window(read_config(folder)):
        said += f"; its sliding window of {window:,} tokens was not passed, only ones up to {WINDOW_LIMIT:,} are"
    return Check(ONNX, "passed", said), found


def _width(dtype: str) -> int:
    return torch.empty(0, dtype=torch_dtype(dtype)).element_size()


def _reference(folder: Path, record: Record, dtype: torch.dtype) -> Any:
    """The folder's model in torch, with its side network if it has one."""
    if not record.plan.stacks or not (folder / SIDE_FILE).is_file():
        return load_merged(folder).to(dtype)
    model = load_base_model(folder, record.plan, dtype=dtype)
    attach_plan(model, record.plan, None)
    tensors = safetensors.torch.load_file(folder / SIDE_FILE)
    names = {target.weight: target.parameter for target in record.plan.whole}
    model.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()}, strict=False)
    return model.eval()


def header_digests(folder: Path) -> dict[str, str]:
    """sha256 of each safetensors file's header: where a graph's weights lie is true while they hold."""
    return {path.name: header_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def side_tensors(plan: SurgeryPlan, delta: SideDelta) -> dict[str, Tensor]:
    """What lies beside a backbone: its side network, and heads under the names and in the dtypes that the base has."""
    whole = {target.weight: delta.whole[target.parameter].stored(target.dtype) for target in plan.whole}
    return whole | dict(delta.state)


def _check_side(folder: Path, adapter: Adapter | None, why: str) -> Check:
    """The side network and the heads are the adapter's. Raises: CheckError."""
    if adapter is None:
        return Check("side network", "not run", why)
    wanted = side_tensors(adapter.plan, require_side(adapter.delta, "verify"))
    found = safetensors.torch.load_file(folder / SIDE_FILE)
    same = {n for n in wanted.keys() & found.keys() if torch.equal(bits_of(wanted[n]), bits_of(found[n]))}
    if wrong := sorted((wanted.keys() | found.keys()) - same):
        raise CheckError(wrong[0], "it is not what was trained", expected="the adapter's values", fix="Export again")
    return Check("side network", "passed", f"all {len(wanted)} tensors are the adapter's")


def verify_graphs(
    folder: Path, record: Record, adapter: Adapter | None, why_no_adapter: str, *, numeric: bool
) -> list[Check]:
    """Whether a folder's graphs are those that were written, fit their data, and compute what torch does.

    Of a side network also whether it is the adapter's, where that is at hand. Raises: CheckError.
    """
    described = record.manifest.export[ONNX]
    for name, digest in {**described["graphs"], **described["copies"]}.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise CheckError(
                str(folder / name),
                "it is absent or has changed",
                expected="the file that was exported",
                fix="Export again",
            )
    found = header_digests(folder)
    changed = sorted(name for name, digest in described["headers"].items() if found.get(name) != digest)
    if changed:
        raise CheckError(
            str(folder / changed[0]), "its header has changed, and with it where weights lie",
            expected="the file that was exported", fix="Export again",
        )  # fmt: skip
    checks = [
        Check(
            "graphs",
            "passed",
            f"{counted(len(described['graphs']), 'graph')} as exported; {counted(len(found), 'file')} of weights with "
            "the header it had",
        )
    ]
    if record.plan.stacks:
        checks.append(_check_side(folder, adapter, why_no_adapter))
    dtype = DTYPES[described["dtype"]]
    if not numeric or dtype == torch.bfloat16:
        return [
            *checks,
            Check(ONNX, "not run", "--no-numeric" if not numeric else "onnxruntime's CPU does not compute in bf16"),
        ]
    return [*checks, check_folder(folder, record, dtype, {name: name for name in described["graphs"]})[0]]


# --- onnxruntime-genai


def genai_config(folder: Path) -> dict[str, Any]:
    """What onnxruntime-genai asks of a decoder's folder: names of inputs and outputs, sizes, and how to sample."""
    config = read_config(folder).get_text_config()
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    ids = {
        name: generation.get(name) if generation.get(name) is not None else getattr(config, name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    end = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    ids["pad_token_id"] = end if ids["pad_token_id"] is None else ids["pad_token_id"]
    past, present = "past_key_values.%d", "present.%d"
    heads = config.num_attention_heads
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
            "past_key_names": f"{past}.key", "past_value_names": f"{past}.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": f"{present}.key", "present_value_names": f"{present}.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }  # fmt: skip
    length = config.max_position_embeddings
    search = {
        name: generation[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty") if name in generation
    }
    return {
        "model": {
            **{name: value for name, value in ids.items() if value is not None}, "context_length": length,
            "decoder": decoder, "type": "decoder", "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)), "max_length": length, "min_length": 0,
            "num_beams": 1, "past_present_share_buffer": False, **search,
        },
    }  # fmt: skip
