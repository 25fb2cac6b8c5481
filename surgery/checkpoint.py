"""A model folder on disk, opened and checked without loading it; nothing outside the folder is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import DamagedError, NotAModelError, PathEscapeError
from surgery.tensorfile import CHUNK_BYTES, Header, TensorInfo, read_header, read_range, read_tensor, strict_object

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
RECORD_FILE = "surgery.json"
RECIPE_ENDINGS = (".yaml", ".yml")  # of a path that names a recipe, where a model or an adapter could stand too
MODEL_FILE, ENCODER_FILE, DECODER_FILE = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"  # an ONNX folder's
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_SMALL_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    """The folder itself; for a snapshot of the hub's cache also the blobs that its links point to."""
    real = root.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return (real, real.parent.parent / "blobs")
    return (real,)


def require_model(model: str | Path) -> None:
    """A folder, or what may be a hub id: anything else has the form of a path. Raises: NotAModelError."""
    text = str(model)
    looks_like_path = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") != 1
    if Path(text).is_file():
        require_folder(Path(text))
    if looks_like_path and not Path(text).is_dir():
        raise NotAModelError(text, "no such folder", expected="a model folder or a hub id such as org/name")


def require_folder(path: Path) -> None:
    """Raises: NotAModelError: a path that cannot be one of ours."""
    if not path.is_dir():
        found, fix = ("a file", f"Name its folder: {path.parent}") if path.exists() else ("no such folder", "")
        raise NotAModelError(str(path), found, expected="a model, adapter or merged folder", fix=fix)


def require_record(folder: Path) -> None:
    """Raises: NotAModelError: a folder that surgery has not made."""
    if not (folder / RECORD_FILE).is_file():
        expected = "a folder made by `surgery apply` or `surgery export`"
        raise NotAModelError(str(folder), f"no {RECORD_FILE}", expected=expected)


def path_inside(root: Path, name: str) -> Path:
    """`root/name`, once it is sure that it stays inside `root`, links followed.

    Raises: PathEscapeError: absolute, `..`, a link that leads out, or a name that no file can have.
    """
    path = root / name
    roots = _allowed_roots(root)
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long; NUL, half a character; a loop before Python 3.13
        found = f"{name[:80]!r} cannot be followed"
        raise PathEscapeError(f"{root}", found, expected="a file inside the folder") from error
    escapes = Path(name).is_absolute() or ".." in Path(name).parts
    if escapes or not any(resolved.is_relative_to(allowed) for allowed in roots):
        raise PathEscapeError(
            f"{root}",
            f"{name!r} leads to {resolved}",
            expected="a file inside the folder",
            fix="Copy or hard-link the file into the folder",
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DamagedError where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=strict_object)
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedError(str(path), f"it does not parse ({error})", expected="JSON") from error
    if not isinstance(document, dict):
        raise DamagedError(str(path), f"a JSON {type(document).__name__}", expected="a JSON object")
    return document


def _read_index(root: Path) -> dict[str, str]:
    weight_map = read_json(path_inside(root, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(not isinstance(f, str) for f in weight_map.values()):
        raise DamagedError(str(root / INDEX_FILE), "no usable weight_map", expected="tensor names mapped to files")
    return weight_map


def _explain_missing(root: Path) -> NotAModelError | DamagedError:
    if any(any(root.glob(pattern)) for pattern in _PICKLE_PATTERNS):
        fix = "Convert it with `save_pretrained(..., safe_serialization=True)` on a machine you trust it on"
        return NotAModelError(
            str(root), "its weights are pickle files, which can run code when loaded", expected="safetensors", fix=fix
        )
    if any(root.glob("model-*-of-*.safetensors")):
        return DamagedError(str(root), f"shards without {INDEX_FILE}", expected="the index", fix="Fetch it again")
    if (root / "adapter_config.json").exists():
        return NotAModelError(str(root), "a PEFT adapter", expected="a whole model", fix="Merge it with PEFT first")
    return NotAModelError(str(root), f"no {WEIGHTS_FILE} and no {INDEX_FILE}", expected="a Hugging Face model folder")


class Checkpoint(Mapping[str, TensorInfo]):
    """A model folder, opened by its headers alone: tensor name -> where it lies. Read-only; holds no tensor."""

    def __init__(self, root: Path, headers: Mapping[str, Header], index: Mapping[str, str] | None) -> None:
        self.root, self.headers, self.is_sharded = root, headers, index is not None
        self._infos: dict[str, TensorInfo] = {}
        for header in headers.values():
            for info in header.tensors:
                if info.name in self._infos:
                    found = f"{info.name!r} stands in {self._infos[info.name].file} and in {info.file}"
                    raise DamagedError(str(root), found, expected="each tensor in one file")
                self._infos[info.name] = info
        for name, file in (index or {}).items():
            if name not in self._infos or self._infos[name].file != file:
                raise DamagedError(
                    str(root / INDEX_FILE),
                    f"it places {name!r} in {file}, whose header does not",
                    expected="index and headers to agree",
                    fix="Fetch the folder again",
                )

    @classmethod
    def open(cls, root: str | Path) -> Checkpoint:
        """Open a folder with `model.safetensors` or an index and shards.

        Raises: NotAModelError: no folder, no safetensors; DamagedError: headers or index lie; PathEscapeError.
        """
        root = Path(root)
        if not root.is_dir():
            raise NotAModelError(str(root), "no such folder", expected="a Hugging Face model folder")
        has_file = (root / WEIGHTS_FILE).exists()  # with both in a folder from_pretrained takes this one
        index = _read_index(root) if (root / INDEX_FILE).exists() and not has_file else None
        if index is None and not has_file:
            raise _explain_missing(root)
        files = sorted(set(index.values())) if index else [WEIGHTS_FILE]
        paths = {file: path_inside(root, file) for file in files}
        for file, path in paths.items():
            if not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises for a name that is too long
                found = f"{file[:80]!r} is missing or no file"
                raise DamagedError(str(root), found, expected="every file of the checkpoint", fix="Fetch it again")
        return cls(root, {file: read_header(path) for file, path in paths.items()}, index)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self._infos.values())

    def path_of(self, name: str) -> Path:
        return self.root / self[name].file

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """A tensor's bytes in order, at most `chunk_bytes` at a time. Each view is valid until the next one."""
        info = self[name]
        return read_range(self.path_of(name), info.begin, info.end, chunk_bytes)

    def row_chunks(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """A matrix's bytes by whole rows: (first row, bytes of some rows). Each view is valid until the next one."""
        info = self[name]
        row_bytes = max(1, info.size_bytes // max(1, info.shape[0] if info.shape else 1))  # a scalar is one row
        rows = max(1, CHUNK_BYTES // row_bytes)
        for number, chunk in enumerate(self.chunks(name, rows * row_bytes)):
            yield number * rows, chunk

    def sha256(self, name: str) -> str:
        """The digest of a tensor's bytes as they stand in the file."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor, copied into memory. Raises DamagedError for a dtype torch has no name for."""
        return read_tensor(self.path_of(name), self[name])

    def small_files(self) -> list[str]:
        """Configuration, tokenizer and licence files to carry along, as paths relative to the root, sorted."""
        return sorted(_small_files(self.root))


def _small_files(root: Path) -> Iterator[str]:
    ours = {INDEX_FILE, RECORD_FILE, "adapter_config.json"}
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith(".") and not path.is_symlink():
            inner = [entry for entry in path.iterdir() if entry.is_file()]
            if inner and all(entry.suffix in _SMALL_SUFFIXES for entry in inner):  # e.g. 1_Pooling/config.json
                yield from (f"{path.name}/{entry.name}" for entry in inner)
        elif path.is_file() and path.name not in ours and _is_small(path):
            yield path.name


def _is_small(path: Path) -> bool:
    known = path.suffix in _SMALL_SUFFIXES or path.name.startswith(_SMALL_NAMES)
    return known and not path.name.startswith(".")
