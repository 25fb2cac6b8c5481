"""One safetensors file: its header checked, its tensors read one at a time.

Nothing here imports torch until a tensor is asked for. Headers are parsed here and not by the safetensors library
because a streaming merge needs each tensor's byte offsets, which the library does not give out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import DamagedError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
CHUNK_BYTES = 8 << 20

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


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
        document = json.loads(text.decode("utf-8"), object_pairs_hook=strict_object)
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


def header_sha256(path: Path) -> str:
    """The digest of a safetensors file's header: what stands where in the file. Raises: DamagedError."""
    return hashlib.sha256(read_header(path).raw).hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a whole file."""
    digest = hashlib.sha256()
    for chunk in read_range(path, 0, path.stat().st_size):
        digest.update(chunk)
    return digest.hexdigest()
