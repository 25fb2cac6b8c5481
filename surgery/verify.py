"""Is the export what was trained? By bytes against the base and the adapter, and by running both.

The byte checks share no code with the writer: they read base and merged side by side and look at what differs.
"""

from __future__ import annotations

import gc
import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import AutoTokenizer

from surgery.adapter import Adapter, find_base, open_adapter
from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, Checkpoint, read_json
from surgery.compat import TRANSFORMERS_5, image_size, pixels_config, quiet_loading
from surgery.delta import (
    ADAPTER_FILE,
    ColumnPatch,
    backbone_sha256,
    bits,
    columns_here,
    require_backbone,
    require_columns,
    require_side,
)
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DamagedError,
    NotAModelError,
    RequestError,
    SurgeryError,
    counted,
)
from surgery.images import TASK as IMAGES
from surgery.lookup import ONNX_VERIFY, resolve
from surgery.manifest import MERGED, ONNX, REMOTE_CODE, UNDO_FILE, Check, Record, read_record
from surgery.methods.read import MODELING_FILE, modeling_config, modeling_source
from surgery.operate import align, attach_plan, evaluating, load_base_model
from surgery.plan import NO_METHOD, SurgeryPlan, Target
from surgery.survey import class_for, own_task, read_config
from surgery.tensorfile import (
    CHUNK_BYTES,
    FLOAT_DTYPES,
    TensorFile,
    TensorInfo,
    dtype_name,
    file_sha256,
    tensor_from_bytes,
    tensor_to_bytes,
    torch_dtype,
)
from surgery.union import unite
from surgery.verify_quantized import DEQUANTIZED, MERGE_DIFFERENCE, check_seen, dense_infos, measure
from surgery.writing import replace_file

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The surgeon looked at the chart and said:",
    "def add(a, b):\n    return",
    "7, 14, 21, 28,",
)
RANDOM_TOKENS = 24
EXPORT_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
LOGITS_BYTES_FACTOR = 1.6  # loading needs the weights and, while they move, one more shard of them


@dataclass(frozen=True)
class Verification:
    """What was checked. `max_logit_difference` is None where the models were not run."""

    checks: tuple[Check, ...]
    max_logit_difference: float | None

    def lines(self) -> list[str]:
        """One line a check."""
        return [f"{check.result:8} {check.name}: {check.detail}" for check in self.checks]


@dataclass(frozen=True)
class _Sides:
    """What is compared: the merged folder, its base, record and undo file and, where it is at hand, its adapter.

    A folder with a side network has no undo file: its base lies in it untouched.
    """

    merged: Checkpoint
    base: Checkpoint
    record: Record
    undo: TensorFile | None
    adapter: Adapter | None
    why_no_adapter: str


def verify(
    folder: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    base: str | Path | None = None,
    prompts: Sequence[str] = (),
    numeric: bool = True,
) -> Verification:
    """Check a merged folder, one with a side network or one with ONNX graphs; write the outcome into its record.

    adapter: where it is not where it was; of a folder that was merged from several, all of them, in any order.
    Raises: CheckError where a check does not hold; NotAModelError, DamagedError, BaseMismatchError.
    """
    folder = Path(folder)
    record, checks, difference = read_record(folder, MERGED, REMOTE_CODE, ONNX), [], None
    named = (adapter,) if isinstance(adapter, (str, Path)) else tuple(adapter or ())
    opened, why = _find_adapters(record, folder, tuple(map(Path, named)), base)
    if record.kind == ONNX:
        checks += _check_carried(folder, record, base)
    else:
        sides = _open_sides(folder, record, opened, why, base)
        checks += [_check_names(sides), _check_untouched(sides)]  # first: what follows reads tensors by these names
        checks += _check_side(sides) if record.plan.stacks else _check_targets(sides)
        skipped = (_skipped("--no-numeric"), None)
        check, difference = _check_logits(sides, tuple(prompts) or PROMPTS) if numeric else skipped
        checks.append(check)
        checks += _measure_merge(sides, tuple(prompts) or PROMPTS, numeric=numeric)
    if ONNX in record.manifest.export:
        checks += resolve(ONNX_VERIFY)(folder, record, opened, why, numeric=numeric)
    manifest = replace(record.manifest, checks=tuple(checks))
    replace_file(folder / RECORD_FILE, replace(record, manifest=manifest).to_json())
    return Verification(tuple(checks), difference)


def _open_sides(folder: Path, record: Record, adapter: Adapter | None, why: str, base: str | Path | None) -> _Sides:
    undo_path = folder / UNDO_FILE
    if record.kind == MERGED and not undo_path.is_file():
        raise DamagedError(str(folder), f"no {UNDO_FILE}", expected="a whole merged folder", fix="Export again")
    root = find_base(record, folder, base)
    undo = TensorFile(undo_path) if record.kind == MERGED else None
    return _Sides(Checkpoint.open(folder), Checkpoint.open(root), record, undo, adapter, why)


def _find_adapters(
    record: Record, folder: Path, named: tuple[Path, ...], base: str | Path | None
) -> tuple[Adapter | None, str]:
    """The adapter of an export, the union of its adapters, or why it is not at hand. What was named must be usable."""
    parents = record.manifest.parents
    if not parents:
        if len(named) > 1:
            raise RequestError("--adapter", f"{len(named)} folders for {folder}", expected="the one it was made of")
        return _find_adapter(record.manifest.adapter, folder, *named)
    if named and len(named) != len(parents):
        raise RequestError("--adapter", counted(len(named), "folder"), expected=f"all {len(parents)} it was made of")
    digests = {file_sha256(path / ADAPTER_FILE): path for path in named if (path / ADAPTER_FILE).is_file()}
    opened = []
    for source in parents:
        at = digests.get(source.get("sha256", ""), named[0]) if named else None
        found, why = _find_adapter(source, folder, *([at] if at else []))
        if found is None:
            return None, f"{why} ({source.get('path', '')}, one of {len(parents)})"
        opened.append(found)
    return unite(opened, base if base is not None else find_base(record, folder)), ""


def _find_adapter(source: Mapping[str, str], folder: Path, named: Path | None = None) -> tuple[Adapter | None, str]:
    """An adapter by its recorded path and digest, or why it is not at hand. One that was named must be usable."""
    if not source:
        if named:
            raise RequestError("--adapter", f"{named}, and {folder} was made of none", expected="no --adapter")
        return None, "it was made of none"
    path = named or folder / source.get("path", "")
    if not named and not (path / ADAPTER_FILE).is_file():
        return None, f"its adapter {source.get('path', '')!r} is not there"
    try:
        if file_sha256(path / ADAPTER_FILE) == source.get("sha256"):
            return open_adapter(path), ""
    except (SurgeryError, OSError):
        if named:
            raise
    if named:
        raise CheckError(str(path), "it is not the adapter that was exported", expected="the recorded digest")
    return None, "its adapter has changed since"


def _skipped(why: str) -> Check:
    return Check("logits", "not run", why)


def _dtype_of(sides: _Sides, info: TensorInfo) -> str:
    return sides.merged[sides.record.plan.merged_name(info.name)].dtype


def _check_names(sides: _Sides) -> Check:
    """Nothing is lost and nothing is added but new heads."""
    plan = sides.record.plan
    infos = dense_infos(sides.base, plan)
    expected = {plan.merged_name(name) for name in infos} | {w.weight for w in plan.whole if not w.sha256}
    expected |= {t.parameter for t in plan.side}
    difference = sorted(expected ^ set(sides.merged))
    if difference:
        raise CheckError(
            str(sides.merged.root),
            f"{len(difference)} tensors missing or surplus, first {difference[0]!r}",
            expected="the base's tensors, new heads and a side network's",
        )
    heads = {w.weight for w in plan.whole}
    wanted = {n: (shape, _exported_dtype(sides, dtype)) for n, (shape, dtype) in infos.items() if n not in heads}
    wanted |= {w.weight: (w.shape, _exported_dtype(sides, w.dtype)) for w in plan.whole}
    for name, (shape, dtype) in wanted.items():
        info = sides.merged[plan.merged_name(name)]
        if (info.shape, info.dtype) != (shape, dtype):
            raise CheckError(name, f"{info.dtype} {list(info.shape)}", expected=f"{dtype} {list(shape)}")
    return Check("names", "passed", f"all {len(infos)} tensors of the base are there, {len(heads)} trained whole")


def _exported_dtype(sides: _Sides, dtype: str) -> str:
    """What the export made of a tensor's dtype."""
    cast = EXPORT_DTYPES.get(sides.record.manifest.export.get("dtype", "keep"), dtype)
    return cast if dtype in FLOAT_DTYPES else dtype


def _chunk_pairs(sides: _Sides, name: str) -> Iterator[tuple[int, bytes | memoryview, bytes | memoryview]]:
    """(first row, base, merged) by rows; the base cast to the merged dtype."""
    info, kind = sides.base[name], _dtype_of(sides, sides.base[name])
    merged_name = sides.record.plan.merged_name(name)
    merged = sides.merged.row_chunks(merged_name) if kind == info.dtype else _same_rows(sides, name, merged_name)
    for (first, ours), (_, theirs) in zip(sides.base.row_chunks(name), merged, strict=True):
        if kind != info.dtype:
            cast = tensor_from_bytes(bytearray(ours), info.dtype, (-1,)).to(torch_dtype(kind))
            yield first, tensor_to_bytes(cast), theirs
        else:
            yield first, ours, theirs


def _same_rows(sides: _Sides, name: str, merged_name: str) -> Iterator[tuple[int, memoryview]]:
    """The merged tensor cut where the base's chunks are cut: its values have another width."""
    base, merged = sides.base[name], sides.merged[merged_name]
    rows = max(1, base.shape[0]) if base.shape else 1
    row_bytes = merged.size_bytes // rows
    step = max(1, CHUNK_BYTES // max(1, base.size_bytes // rows))
    for number, chunk in enumerate(sides.merged.chunks(merged_name, max(1, step * row_bytes))):
        yield number * step, chunk


def _check_untouched(sides: _Sides) -> Check:
    """Every tensor that the plan does not name is the base's, byte for byte (or cast, where the export cast)."""
    plan = sides.record.plan
    touched = {t.weight for t in plan.targets} | {w.weight for w in plan.whole}
    if plan.quantization and _is_dequantized(sides):
        touched |= set(plan.quantization.layers.values())
    names = [name for name in dense_infos(sides.base, plan) if name not in touched]
    for name in names:
        for _, ours, theirs in _chunk_pairs(sides, name):
            if ours != theirs:
                raise CheckError(
                    name,
                    "it differs from the base",
                    expected="the base's bytes: it was not trained",
                    fix="Export again",
                )
    return Check("untouched tensors", "passed", f"{len(names)} equal the base's byte for byte")


def _check_carried(folder: Path, record: Record, base: str | Path | None) -> list[Check]:
    """The tensors beside graphs are the base's, byte for byte: by the base, or by the digest that a plan has of it."""
    checkpoint, plan = Checkpoint.open(folder), record.plan
    if base is None and plan.backbone_sha256:
        if backbone_sha256(checkpoint) != plan.backbone_sha256:
            found = "its tensors are not those of the base that the adapter was made for"
            raise CheckError(str(folder), found, expected="the recorded digest", fix="Export again")
        return [Check("untouched tensors", "passed", "they have the digest of the base that the adapter was made for")]
    try:
        root = find_base(record, folder, base)
    except (BaseMismatchError, NotAModelError) as error:
        if base is not None:
            raise
        return [Check("untouched tensors", "not run", f"{error.where}: {error.found}")]
    bare = replace(record, plan=SurgeryPlan(NO_METHOD, {}, plan.architecture, plan.task))
    origin = Checkpoint.open(root)
    require_backbone(origin, plan)
    sides = _Sides(checkpoint, origin, bare, None, None, "")
    return [_check_names(sides), _check_untouched(sides)]


def _is_dequantized(sides: _Sides) -> bool:
    return sides.record.manifest.export.get("merge_base") == DEQUANTIZED


def _check_targets(sides: _Sides) -> list[Check]:
    """Of each target only planned columns differ, all of them hold what was trained, and they did move."""
    if _is_dequantized(sides):
        return _check_dequantized(sides)
    said = _what_moved(*_compare_targets(sides, sides.record.plan.targets))
    if sides.adapter:
        _check_heads(sides, sides.adapter)
    values = Check("trained columns", "passed", "all values are the adapter's")
    if not sides.adapter:
        values = Check("trained columns", "not run", sides.why_no_adapter)
    return [Check("planned columns", "passed", said), values]


def _compare_targets(sides: _Sides, targets: Iterable[Target]) -> tuple[int, int]:
    """How many of them differ from the base in their columns, and how many do not. Raises: CheckError."""
    moved = unmoved = 0
    assert sides.undo is not None  # noqa: S101  a merged folder has one
    for target in targets:
        columns = sides.undo.read(f"{target.module}.columns")
        written, differs = _compare_target(sides, target, columns)
        if sides.adapter:
            _require_trained(sides, target, columns, written, differs=differs)
        moved, unmoved = moved + differs, unmoved + (not differs)
    return moved, unmoved


def _check_dequantized(sides: _Sides) -> list[Check]:
    """Every quantized weight is what training saw; a target that is not quantized is the base's but for its columns."""
    adapter, plan = sides.adapter, sides.record.plan
    patches = require_columns(adapter.delta, "verify").patches if adapter else None
    if adapter:
        _check_heads(sides, adapter)
    checks = check_seen(sides.base, sides.merged, plan, patches, sides.why_no_adapter)
    held = plan.quantization.layers if plan.quantization else {}
    dense = [target for target in plan.targets if target.module not in held]
    if dense:
        checks.append(Check("planned columns", "passed", _what_moved(*_compare_targets(sides, dense))))
    return checks


def _require_trained(sides: _Sides, target: Target, columns: Tensor, written: Tensor, *, differs: bool) -> None:
    """A target's columns as written (out, r) are what its adapter trained; of a union, each adapter its own."""
    original = _original(sides, target).to(written.dtype)
    moves, left = False, len(columns)
    for patch in _trained_patches(sides, target):
        at = torch.searchsorted(columns, patch.columns).clamp(max=len(columns) - 1)
        stored = bits_of(patch.stored().to(written.dtype))
        if not torch.equal(columns[at], patch.columns) or not torch.equal(stored, bits_of(written[:, at])):
            raise CheckError(
                target.weight,
                "its columns are not what was trained",
                expected="the adapter's values",
                fix="Export again",
            )
        moves, left = moves or not torch.equal(stored, bits_of(original[:, at])), left - len(at)
    if left:
        raise CheckError(
            target.weight, f"{counted(left, 'column')} of no adapter", expected="the trained columns alone"
        )
    if differs != moves:
        raise CheckError(target.weight, "it equals the base", expected="the trained columns")


def _trained_patches(sides: _Sides, target: Target) -> list[ColumnPatch]:
    """What each adapter trained of a target, read from its own file."""
    assert sides.adapter is not None  # noqa: S101  asked for where there is one
    deltas = [require_columns(one.delta, "verify") for one in sides.adapter.parents or (sides.adapter,)]
    return [delta.patches[target.module] for delta in deltas if target.module in delta.patches]


def _what_moved(moved: int, unmoved: int) -> str:
    """How many targets differ from the base. A merge in which none does is right, and hardly what was wanted."""
    why = "were not trained, or rounding to the base's dtype undid it"
    if unmoved and not moved:
        return f"no column moved: 0 of {counted(unmoved, 'layer')} differ from the base; they {why}"
    said = f"{counted(moved, 'layer')} {'differs' if moved == 1 else 'differ'} from the base in planned columns only"
    if unmoved:
        said += f"; {counted(unmoved, 'layer')} did not move: they {why}"
    return said


def _check_side(sides: _Sides) -> list[Check]:
    """The side network is the adapter's, and what runs it is the project's own module."""
    plan, folder = sides.record.plan, sides.merged.root
    _require_own_code(folder, plan)
    code = Check("modeling file", "passed", "it is the project's own module")
    if not sides.adapter:
        return [code, Check("side network", "not run", sides.why_no_adapter)]
    delta = require_side(sides.adapter.delta, "verify")
    for name, values in delta.state.items():
        if not torch.equal(bits_of(values), bits_of(sides.merged.read_tensor(name).to(values.dtype))):
            raise CheckError(name, "it is not what was trained", expected="the adapter's values", fix="Export again")
    _check_heads(sides, sides.adapter)
    return [code, Check("side network", "passed", f"all {len(delta.state)} tensors are the adapter's")]


def _require_own_code(folder: Path, plan: SurgeryPlan) -> None:
    """The modeling file is what we write, and config.json has transformers run it and nothing else."""
    path, fix = folder / MODELING_FILE, "Export again with this version of checkpoint-surgery"
    if not path.is_file() or path.read_bytes() != modeling_source(plan.architecture).encode():
        raise CheckError(str(path), "it is not what this version writes", expected="it", fix=fix)
    config, wanted = read_json(folder / CONFIG_FILE), json.loads(json.dumps(modeling_config(plan)))
    other = [key for key in wanted if config.get(key) != wanted[key]]
    if other:
        raise CheckError(str(folder / CONFIG_FILE), f"{other[0]} is not what the plan says", expected="it", fix=fix)


def _check_heads(sides: _Sides, adapter: Adapter) -> None:
    """What was trained whole is what was trained. Raises: CheckError."""
    for target in sides.record.plan.whole:
        written = sides.merged.read_tensor(sides.record.plan.merged_name(target.weight))
        stored = adapter.delta.whole[target.parameter].stored(dtype_name(written.dtype))
        if not torch.equal(bits_of(stored), bits_of(written)):
            found = "it is not what was trained"
            raise CheckError(target.weight, found, expected="the adapter's values", fix="Export again")


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's bit pattern, so that -0.0 and NaN compare as bytes do."""
    return torch.from_numpy(bits(tensor).view(f"i{tensor.element_size()}").copy())


def _original(sides: _Sides, target: Target) -> Tensor:
    assert sides.undo is not None  # noqa: S101  a merged folder has one
    return sides.undo.read(f"{target.module}.original")


def _compare_target(sides: _Sides, target: Target, columns: Tensor) -> tuple[Tensor, bool]:
    """The merged columns (out, r), and whether anything differs. Raises CheckError where another column does."""
    kind = _dtype_of(sides, sides.base[target.weight])
    written = torch.empty((target.out_features, len(columns)), dtype=torch_dtype(kind))
    picked, wanted = bits(written), columns.numpy()
    differs = False
    for first, ours, theirs in _chunk_pairs(sides, target.weight):
        rows = np.frombuffer(theirs, picked.dtype)
        unequal = rows != np.frombuffer(ours, picked.dtype)
        differs = differs or bool(unequal.any())
        here = columns_here(target, wanted, first, rows.size)
        here.read(rows, picked)
        unequal.reshape(here.shape)[:, here.lines] = False
        if unequal.any():
            raise CheckError(
                target.weight,
                "columns outside the plan differ from the base",
                expected=f"only its {len(columns)} planned columns to differ",
                fix="Export again",
            )
    return written, differs


# --- by running


def _check_logits(sides: _Sides, prompts: Sequence[str]) -> tuple[Check, float | None]:
    """Base with adapter against the merged folder loaded afresh, one after the other."""
    if not sides.adapter:
        return _skipped(sides.why_no_adapter), None
    needed = int(sides.merged.size_bytes * LOGITS_BYTES_FACTOR)
    free = psutil.virtual_memory().available
    if needed > free:
        return _skipped(
            f"needs {needed:,} bytes of memory, {free:,} are free; the byte checks above are complete"
        ), None
    inputs = model_inputs(sides.merged.root, prompts)
    plan = sides.record.plan if _is_dequantized(sides) else replace(sides.record.plan, quantization=None)
    expected = _run_trained(sides, plan, inputs)
    found = run_model(load_merged(sides.merged.root, own_class(sides.merged.root, sides.record)), inputs)
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, found, strict=True))
    is_cast = sides.record.manifest.export.get("dtype", "keep") != "keep"
    if not is_cast and any(not torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
        raise CheckError(
            str(sides.merged.root),
            f"its logits differ from the trained model's by up to {difference:.3g}",
            expected="no difference",
            fix="Please report this with `surgery doctor --json`",
        )
    said = f"largest difference to base + adapter {difference:.3g} on {len(inputs)} prompts"
    return Check("logits", "passed", said + (", from the cast asked for" if is_cast else "")), difference


def _run_trained(sides: _Sides, plan: SurgeryPlan, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The outputs of base and adapter, which are gone from memory then."""
    assert sides.adapter is not None  # noqa: S101  the caller's question
    trained = load_base_model(sides.base.root, plan)
    attach_plan(trained, plan, sides.adapter.delta)
    outputs = run_model(trained, inputs)
    del trained
    gc.collect()
    return outputs


def _measure_merge(sides: _Sides, prompts: Sequence[str], *, numeric: bool) -> list[Check]:
    """Of a quantized base merged into the original: what that changes. Nothing for any other merge."""
    held = sides.record.plan.quantization
    if held is None or _is_dequantized(sides):
        return []
    why = "" if sides.adapter else sides.why_no_adapter
    needed = int(sides.merged.size_bytes * LOGITS_BYTES_FACTOR)
    if not numeric or why or needed > psutil.virtual_memory().available:
        return [
            Check(MERGE_DIFFERENCE, "not run", why or ("--no-numeric" if not numeric else f"needs {needed:,} bytes"))
        ]
    inputs = model_inputs(sides.merged.root, prompts)
    seen = _run_trained(sides, sides.record.plan, inputs)
    merged = run_model(load_merged(sides.merged.root), inputs)
    return [measure(seen, merged, held.kind)]


def load_merged(folder: Path, model_class: Any = None) -> Any:
    """A merged (or any) checkpoint as transformers loads it, in its own dtype."""
    if model_class is None:
        config = read_config(folder)
        model_class = class_for(config, own_task(config) if config.architectures else "features")
    dtype_key = "dtype" if TRANSFORMERS_5 else "torch_dtype"
    with quiet_loading():
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **{dtype_key: "auto"})
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = [*info["missing_keys"], *info["mismatched_keys"]]
        raise CheckError(str(folder), f"transformers misses {lost[0]!r}", expected="every weight of the model")
    align(model)
    return model


def own_class(folder: Path, record: Record) -> Any:
    """The class in a folder's modeling file, which is compared with ours before it runs; None where it has none."""
    if record.kind != REMOTE_CODE:
        return None
    module = types.ModuleType(f"surgery_modeling_{record.plan.id}")
    sys.modules[module.__name__] = module  # transformers looks the class's module up by its name
    exec(compile(modeling_source(record.plan.architecture), str(folder / MODELING_FILE), "exec"), module.__dict__)  # noqa: S102
    return getattr(module, f"Read{record.plan.architecture}")


def model_inputs(folder: Path, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """One batch a prompt; without a tokenizer, token numbers or pixels drawn from a fixed seed."""
    config = read_config(folder)
    pictured = pixels_config(config) if own_task(config) == IMAGES else config
    if hasattr(pictured, "num_channels"):
        return [{"pixel_values": pixels} for pixels in _random_pixels(pictured, len(prompts))]
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        batches = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        return [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in batches]
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        size = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(0, size, (1, RANDOM_TOKENS), generator=generator)} for _ in prompts]


def _random_pixels(config: Any, count: int) -> list[Tensor]:
    generator, sizes = torch.Generator().manual_seed(0), (1, config.num_channels, *image_size(config))
    return [torch.randn(sizes, generator=generator) for _ in range(count)]


def _end_with(input_ids: Tensor, eos_token_id: int | None) -> Tensor:
    """An encoder-decoder's classifier looks for the end token."""
    return input_ids if eos_token_id is None else torch.nn.functional.pad(input_ids[:, :-1], (0, 1), value=eos_token_id)


def run_model(model: Any, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The model's first output (logits, or the last hidden state) for each batch."""
    results = []
    with evaluating(model):
        for batch in inputs:
            given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
            if type(model).__name__.endswith("ForSequenceClassification"):
                given["input_ids"] = _end_with(given["input_ids"], model.config.eos_token_id)
            elif model.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"][:, :4]
            results.append(model(**given)[0])
    return results
