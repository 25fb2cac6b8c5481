"""Safetensors checkpoints on disk: open and check without loading, write whole or not at all.

Nothing here imports torch until a tensor is asked for. Headers are parsed here and not by the safetensors library
because a streaming merge needs each tensor's byte offsets, which the library does not give out.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import (
    DamagedError,
    NotAModelError,
    OutputExistsError,
    PathEscapeError,
    RequestError,
    ResourceError,
)

if TYPE_CHECKING:
    from types import TracebackType

    import torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
RECORD_FILE = "surgery.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
CHUNK_BYTES = 8 << 20
WRITERS = 2
FLUSH_BYTES = 64 << 20

# Bits per value, and torch's name where torch has the type (the rest are copied, never read).
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_SMALL_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of `file`, counted from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A safetensors header: its raw bytes (length prefix included), its tensors in file order, its metadata."""

    raw: bytes
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ and whose text can be written again (an escaped lone surrogate cannot)."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()
        result[key] = value
    return result


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a dense tensor; sub-byte types fill whole bytes."""
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    return -(-bits // 8)


def _parse_entry(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(where, "its header entry is malformed", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise DamagedError(where, f"unknown dtype {dtype!r}", expected=f"one of {', '.join(DTYPE_BITS)}")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(type(n) is not int or n < 0 or n >= 1 << 62 for n in numbers) or len(offsets) != 2:
        raise DamagedError(where, f"shape {shape!r}, offsets {offsets!r}", expected="lists of non-negative integers")
    begin, end = offsets
    if end - begin != tensor_bytes(dtype, shape):
        found = f"{end - begin} bytes for {dtype} {shape}"
        raise DamagedError(where, found, expected=f"{tensor_bytes(dtype, shape)} bytes", fix="Fetch the file again")
    if data_start + end > file_bytes:
        found = f"the data ends at byte {data_start + end} of a file of {file_bytes} bytes"
        raise DamagedError(where, found, expected="a whole file", fix="The file is truncated; fetch it again")
    return TensorInfo(name, dtype, tuple(shape), path.name, data_start + begin, data_start + end)


def _check_contiguous(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in tensors:
        if info.begin != position:
            found = f"tensor {info.name!r} begins at byte {info.begin}"
            raise DamagedError(str(path), found, expected=f"byte {position} (no overlap, no hole)")
        position = info.end
    if position != file_bytes:
        raise DamagedError(str(path), f"{file_bytes} bytes", expected=f"{position} bytes, by its header")


def read_header(path: Path) -> Header:
    """Parse and check one safetensors file's header; reads no tensor data.

    Raises: DamagedError: the header is malformed, offsets overlap, leave holes or reach past the end of the file.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise DamagedError(str(path), f"{file_bytes} bytes", expected="a safetensors file", fix="Fetch it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, file_bytes - 8):
            expected = f"at most {min(MAX_HEADER_BYTES, file_bytes - 8)}"
            raise DamagedError(str(path), f"a header of {length} bytes", expected=expected, fix="Fetch it again")
        text = file.read(length)
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_strict_object)
        if not isinstance(document, dict):
            raise TypeError("not a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(str(path), f"its header is unreadable ({error})", expected="JSON") from error
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise DamagedError(str(path), "its __metadata__ is malformed", expected="text values")
    infos = [_parse_entry(path, name, entry, 8 + length, file_bytes) for name, entry in document.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_contiguous(path, infos, 8 + length, file_bytes)
    return Header(prefix + text, tuple(infos), metadata)


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """A header, length prefix included, for tensors laid out in the given order: (name, dtype, shape) each."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        end = position + tensor_bytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to eight bytes
    return struct.pack("<Q", len(text)) + text


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    """The folder itself; for a snapshot of the hub's cache also the blobs that its links point to."""
    real = root.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return (real, real.parent.parent / "blobs")
    return (real,)


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
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_strict_object)
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
        row_bytes = max(1, info.size_bytes // max(1, info.shape[0]))
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


class TensorFile:
    """One safetensors file, checked and opened by its header: tensors are read one at a time.

    The file stays open: should another take its place meanwhile, all tensors still come from the one that was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.header = read_header(path)
        self.infos = {info.name: info for info in self.header.tensors}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied into memory."""
        info = self.infos[name]
        data = bytearray(info.size_bytes)
        position = 0
        while position < len(data):
            count = os.preadv(self._descriptor, [memoryview(data)[position:]], info.begin + position)
            if not count:
                raise DamagedError(str(self.path), "it ended while being read", expected="a file that does not change")
            position += count
        return tensor_from_bytes(data, info.dtype, info.shape)


def tensor_from_bytes(data: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over `data` (not copied)."""
    import torch

    if dtype not in TORCH_NAMES:
        raise DamagedError("tensor", f"dtype {dtype}", expected=f"one of {', '.join(TORCH_NAMES)}")
    torch_dtype = getattr(torch, TORCH_NAMES[dtype])
    return (torch.frombuffer(data, dtype=torch_dtype) if data else torch.empty(0, dtype=torch_dtype)).reshape(shape)


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a safetensors file, copied into memory."""
    data = bytearray(info.size_bytes)
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin)
        _read_exactly(file, memoryview(data), path)
    return tensor_from_bytes(data, info.dtype, info.shape)


def tensor_to_bytes(tensor: torch.Tensor) -> bytes:
    """The little-endian bytes safetensors stores for a tensor."""
    import torch

    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; torch's own for one that is not read here."""
    short = str(dtype).removeprefix("torch.")
    return next((name for name, torch_name in TORCH_NAMES.items() if torch_name == short), short)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def _read_exactly(file: Any, view: memoryview, path: Path) -> None:
    position = 0
    while position < len(view):
        count = file.readinto(view[position:])
        if not count:
            raise DamagedError(str(path), "it ended while being read", expected="a file that does not change")
        position += count


def read_range(path: Path, begin: int, end: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Bytes [begin, end) of a file through one reused buffer."""
    buffer = memoryview(bytearray(min(chunk_bytes, max(end - begin, 1))))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end:
            view = buffer[: min(len(buffer), end - begin)]
            _read_exactly(file, view, path)
            yield view
            begin += len(view)


def file_sha256(path: Path) -> str:
    """The digest of a whole file."""
    digest = hashlib.sha256()
    for chunk in read_range(path, 0, path.stat().st_size):
        digest.update(chunk)
    return digest.hexdigest()


def split_shards(sizes_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in their given order, cut into shards of at most `max_shard_bytes`; a larger tensor is a shard alone."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes_bytes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `96MiB` or plain bytes as a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0.0
    if not 1 <= size < 1 << 62:
        raise ValueError(f"{text!r} is no size: write for example 5GB, 500MB or 96MiB")
    return int(size)


def fsync_path(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file and force it to disk."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, header: bytes, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a safetensors file from its header and its data in order, and force it to disk."""
    with StreamWriter() as writer:
        writer.write(path, header, [(0, chunks)])


class StreamWriter:
    """Writes safetensors files from pieces made on the fly. On leaving, all of them are on the disk.

    Two threads make and write pieces; a third forces what is written to disk meanwhile, and each file as a whole while
    the next one is made. A merge takes a digest of every byte it reads, which a copy does not: this is where it
    catches up.
    """

    def __enter__(self) -> StreamWriter:
        self._makers, self._flusher = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(1)
        self._flushed: list[Future[None]] = []
        self._turn = threading.Lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._makers.shutdown()
        self._flusher.shutdown()
        if kind is None:
            for result in self._flushed:
                result.result()

    def write(self, path: Path, header: bytes, pieces: Iterable[tuple[int, Iterable[bytes | memoryview]]]) -> None:
        """One file. `pieces`: (offset behind the header, chunks of bytes) each."""
        file = path.open("wb", buffering=0)
        made: list[Future[None]] = []
        try:
            self._write_chunk(file.fileno(), 0, header)
            for offset, chunks in pieces:
                start = len(header) + offset
                made.append(self._makers.submit(self._write_piece, file.fileno(), start, chunks))
            for result in made:
                result.result()
        finally:
            for result in made:
                result.cancel()
            wait(made)  # no thread may write to a file that is closed
            self._flushed.append(self._flusher.submit(_flush_and_close, file))

    def _write_piece(self, descriptor: int, offset: int, chunks: Iterable[bytes | memoryview]) -> None:
        unflushed = 0
        for chunk in chunks:
            self._write_chunk(descriptor, offset, chunk)
            offset += len(chunk)
            unflushed += len(chunk)
            if unflushed >= FLUSH_BYTES:
                self._flushed.append(self._flusher.submit(os.fdatasync, descriptor))
                unflushed = 0

    def _write_chunk(self, descriptor: int, offset: int, chunk: bytes | memoryview) -> None:
        view = memoryview(chunk)
        while view:
            with self._turn:  # the kernel would have the threads wait for the file's lock by spinning
                count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count


def _flush_and_close(file: FileIO) -> None:
    with file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes | str) -> None:
    """Replace a file by rename, so that a reader sees the old or the new one and never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(temporary, data)
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises ResourceError where `folder`'s file system has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            str(folder),
            f"{free:,} bytes free on its disk",
            expected=f"{needed_bytes:,} bytes",
            fix="Free some space or choose another folder with -o",
        )


_writing: set[Path] = set()  # what this process's writers have open


def remove_stale(out: Path) -> None:
    """Remove what killed processes of this host left beside `out`; a live process's files stay.

    Our own process id on a folder that we are not writing is a killed process's too: containers use ids again.
    """
    for path in out.parent.glob(glob.escape(f".{out.name}.{socket.gethostname()}.") + "*.partial"):
        pid = path.name.rsplit(".", 2)[1]
        is_live = path.absolute() in _writing if pid == str(os.getpid()) else Path(f"/proc/{pid}").exists()
        if pid.isdigit() and not is_live and Path("/proc").exists():
            shutil.rmtree(path, ignore_errors=True)


def require_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raises RequestError where putting a folder at `out` would remove one that is read."""
    for folder in inputs:
        if folder.resolve().is_relative_to(out.resolve()):
            raise RequestError(
                str(out),
                f"{folder}, which is read, would be replaced",
                expected="a folder of its own",
                fix="Choose another with -o",
            )


class CheckpointWriter:
    """A folder that appears whole or not at all: written beside `out`, forced to disk, then renamed.

    Use as a context manager; `path` is where to write. On an exception nothing is left.
    Raises: OutputExistsError: `out` exists (also when another process made it meanwhile) and not `overwrite`.
    """

    def __init__(
        self, out: str | Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
    ) -> None:
        self.out, self.overwrite, self._check = Path(out), overwrite, check
        self.path = self.out.parent / f".{self.out.name}.{socket.gethostname()}.{os.getpid()}.partial"

    def __enter__(self) -> CheckpointWriter:
        if os.path.lexists(self.out) and not (self.overwrite and self._may_be_replaced()):
            raise self._exists()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(self.out)
        _writing.add(self.path.absolute())
        try:
            self.path.mkdir()
        except FileExistsError:
            raise OutputExistsError(str(self.out), "this process is already writing it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            _writing.discard(self.path.absolute())

    def _may_be_replaced(self) -> bool:
        """A folder that one of our commands made, or an empty one: nothing else is ever deleted."""
        return self.out.is_dir() and ((self.out / RECORD_FILE).is_file() or not any(self.out.iterdir()))

    def _exists(self) -> OutputExistsError:
        if self.overwrite:
            return OutputExistsError(
                str(self.out),
                f"it has no {RECORD_FILE}",
                expected="a folder that surgery made",
                fix="Remove it yourself",
            )
        return OutputExistsError(
            str(self.out), "it exists", expected="a new folder", fix="Choose another with -o or give --overwrite"
        )

    def _publish(self) -> None:
        if self._check:
            self._check(self.path)
        for folder, _, _ in os.walk(self.path):
            fsync_path(Path(folder))
        if self.overwrite and os.path.lexists(self.out):
            self._swap()
        else:
            try:
                self.path.rename(self.out)
            except OSError as error:
                raise self._exists() if os.path.lexists(self.out) else error from error
        fsync_path(self.out.parent)

    def _swap(self) -> None:
        """The old folder steps aside under a name of its own, so that a kill in between loses neither."""
        aside = self.out.parent / f"{self.out.name}.replaced-{os.getpid()}"
        self.out.rename(aside)
        try:
            self.path.rename(self.out)
        except OSError:
            aside.rename(self.out)
            raise
        aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
