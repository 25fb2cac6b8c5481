"""The tables of what can be chosen by name, as `module:attribute` strings loaded on demand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from surgery.errors import UnsupportedError, require_known

METHODS = {"paca": "surgery.methods.paca:METHOD", "read": "surgery.methods.read:METHOD"}
BACKENDS = {"local": "surgery.backends.local:BACKEND", "gaudi": "surgery.backends.gaudi:BACKEND"}
EXPORTERS = {
    "safetensors": "exporters.dense:EXPORTER",
    "lora": "exporters.lora:EXPORTER",
    "peft-paca": "exporters.peft_paca:EXPORTER",
    "remote-code": "exporters.remote_code:EXPORTER",
    "onnx": "exporters.onnx_export:EXPORTER",
}
UNDO = "exporters.undo:undo"
ONNX_OPTIONS = "exporters.onnx_folder:OnnxOptions"
ONNX_CHECKPOINT = "exporters.onnx_export:export_checkpoint"
ONNX_PATCH = "exporters.onnx_patch:patch"
ONNX_VERIFY = "exporters.onnx_folder:verify_graphs"


EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "lm_eval": "eval",
    "peft": "lora",
    "PIL": "images",
    "vl_convert": "report",
    "bitsandbytes": "bnb",
    "torchao": "torchao",
}  # by what is imported
CALLED = {"PIL": "Pillow"}  # where a package is imported by another name than it is known by


def resolve(reference: str) -> Any:
    """What `module:attribute` names. Raises UnsupportedError where it needs an extra that is not installed."""
    module, attribute = reference.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise _not_installed(module, error.name, EXTRAS[error.name]) from error


def require_extra(where: str, package: str) -> None:
    """A package of `EXTRAS` can be imported. where: begins the message. Raises: UnsupportedError."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise _not_installed(where, error.name or package, EXTRAS[package]) from error


def _not_installed(where: str, package: str, extra: str) -> UnsupportedError:
    found, fix = f"{CALLED.get(package, package)} is not installed", f"pip install 'checkpoint-surgery[{extra}]'"
    return UnsupportedError(where, found, expected=f"the extra {extra}", fix=fix)


def load(table: Mapping[str, str], name: str, kind: str) -> Any:
    """The record called `name`. Raises RequestError, with the nearest name, where the table has none."""
    require_known(kind, name, table)
    record = resolve(table[name])
    if record.name != name:
        raise RuntimeError(f"{table[name]} calls itself {record.name!r}, the table {name!r}")
    return record


def backend_of(device: str) -> Any:
    """The backend that trains on a device, by a recipe's word for it: the vendor's is not imported for any other."""
    return load(BACKENDS, "gaudi" if device == "hpu" else "local", "--device")
