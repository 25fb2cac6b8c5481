"""Safetensors folders: files that lie, indexes that point elsewhere, and outputs that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import checkpoint, writing
from surgery import tensorfile as module
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.errors import (
    DamagedError,
    NotAModelError,
    OutputExistsError,
    PathEscapeError,
    ResourceError,
    SurgeryError,
)
from surgery.tensorfile import DTYPE_BITS, build_header, read_header, tensor_bytes
from surgery.writing import (
    CheckpointWriter,
    StreamWriter,
    parse_size,
    replace_file,
    require_disk,
    split_shards,
    write_tensors,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)


def sealed(header: bytes, data: bytes = b"") -> bytes:
    """A file with a true length prefix around whatever header it is given."""
    return struct.pack("<Q", len(header)) + header + data


# Two tensors: a (2, 2) float32 and a zero-size one between it and three bytes.
VALID = sealed(
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    b'"none":{"dtype":"I64","shape":[0,7],"data_offsets":[16,16]},"b":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}',
    bytes(range(19)),
)

HOSTILE = {
    "empty": b"",
    "seven bytes": b"\x02\x00\x00\x00\x00\x00\x00",
    "no header": b"\x00\x00\x00\x00\x00\x00\x00\x00",
    "header of 2**64 - 1 bytes": b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
    "header one byte past the end": b"\x03\x00\x00\x00\x00\x00\x00\x00{}",
    "header past the library's limit": struct.pack("<Q", 100_000_001) + b"{}",
    "not JSON": sealed(b"PK\x03\x04 not json"),
    "not UTF-8": sealed(b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "a list": sealed(b"[]"),
    "a number": sealed(b"7"),
    "two documents": sealed(b"{}{}"),
    "deep nesting": sealed(b"[" * 100_000),
    "deep nesting in an entry": sealed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "an endless number": sealed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}'),
    "duplicate name": sealed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "duplicate field": sealed(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "a name that is half a character": sealed(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "entry is a list": sealed(b'{"a":[1]}'),
    "entry is null": sealed(b'{"a":null}'),
    "no dtype": sealed(b'{"a":{"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "surplus field": sealed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"code":"x"}}', b"x"),
    "unknown dtype": sealed(b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "dtype is a list": sealed(b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "dtype is an object": sealed(b'{"a":{"dtype":{},"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "dtype is null": sealed(b'{"a":{"dtype":null,"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "shape is a number": sealed(b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', b"x"),
    "negative size": sealed(b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', b"x"),
    "two negative sizes": sealed(b'{"a":{"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]}}', b"x"),
    "size is a float": sealed(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"x"),
    "size is a truth value": sealed(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"x"),
    "size is text": sealed(b'{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}', b"x"),
    "size is NaN": sealed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "huge sizes times zero": sealed(
        b'{"a":{"dtype":"U8","shape":[4611686018427387904,0],"data_offsets":[0,0]}}',
    ),
    "sizes that wrap at 64 bits": sealed(
        b'{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    ),
    "one offset": sealed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', b"x"),
    "three offsets": sealed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', b"x"),
    "negative offset": sealed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', b"x"),
    "offsets backwards": sealed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', b"x"),
    "offsets past the end": sealed(b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', b"x"),
    "offsets far past the end": sealed(
        b'{"a":{"dtype":"U8","shape":[4000000000000000000],"data_offsets":[0,4000000000000000000]}}', b"x"
    ),
    "bytes unlike the shape": sealed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}', b"xyz"),
    "overlap": sealed(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"xyz",
    ),
    "the same bytes twice": sealed(
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        b"xyz",
    ),
    "hole at the start": sealed(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"xyz"),
    "hole": sealed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        b"xyz",
    ),
    "zero-size tensor inside another": sealed(
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
        b"xyz",
    ),
    "trailing byte": VALID + b"\x00",
    "trailing data without tensors": sealed(b"{}", b"x"),
    "metadata is a list": sealed(b'{"__metadata__":[]}'),
    "metadata holds a number": sealed(b'{"__metadata__":{"format":1}}'),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tests that draw examples: they write one file over and over."""
    return tmp_path_factory.mktemp("scratch")


def put(folder: Path, data: bytes = VALID, name: str = "model.safetensors") -> Path:
    """Write bytes into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def put_index(folder: Path, weight_map: object) -> None:
    """Write an index with that weight map, whatever it is."""
    put(folder, json.dumps({"metadata": {}, "weight_map": weight_map}).encode(), "model.safetensors.index.json")


# --- headers


def test_a_valid_file_gives_names_shapes_and_bytes(tmp_path: Path) -> None:
    """Tensors come in file order with absolute offsets; zero-size tensors are fine."""
    put(tmp_path)
    opened = Checkpoint.open(tmp_path)
    assert list(opened) == ["a", "none", "b"]
    assert (opened["a"].dtype, opened["a"].shape, opened["a"].size_bytes) == ("F32", (2, 2), 16)
    assert opened["a"].begin == len(VALID) - 19
    assert b"".join(bytes(chunk) for chunk in opened.chunks("b", 2)) == bytes([16, 17, 18])
    assert opened.read_tensor("none").shape == (0, 7)
    assert opened.read_tensor("b").tolist() == [16, 17, 18]
    assert (len(opened), opened.size_bytes, opened.is_sharded) == (3, 19, False)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_lies_is_damaged(kind: str, tmp_path: Path) -> None:
    """Every hostile file gives a DamagedError that names the file, and nothing else."""
    put(tmp_path, HOSTILE[kind])
    with pytest.raises(DamagedError) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    str(caught.value).encode()  # a message can be printed


def test_a_file_cut_anywhere_is_damaged(scratch: Path) -> None:
    """No prefix of a file passes for the file."""
    for length in range(len(VALID)):
        path = put(scratch, VALID[:length])
        with pytest.raises(DamagedError):
            read_header(path)
    assert read_header(put(scratch)).raw + bytes(range(19)) == VALID


@PROPERTY
@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 8),
)
def test_changed_bytes_never_crash(changes: list[tuple[int, int]], cut: int, scratch: Path) -> None:
    """A damaged file is either read or refused with one of our errors."""
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    path = put(scratch, bytes(data[: len(data) - cut]))
    try:
        header = read_header(path)
    except SurgeryError:
        return
    assert sum(info.size_bytes for info in header.tensors) + len(header.raw) == path.stat().st_size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["U8", "F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries({}, optional={"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@PROPERTY
@given(document=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values))
def test_any_json_header_is_read_or_refused(document: dict[str, object], scratch: Path) -> None:
    """Well-formed JSON of any shape in place of a header never crashes."""
    path = put(scratch, sealed(json.dumps(document).encode(), b"xyz"))
    with contextlib.suppress(DamagedError):
        read_header(path)


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), max_size=6)


@PROPERTY
@given(table=tables, metadata=st.dictionaries(names, st.text(max_size=5).filter(str.isprintable), max_size=2))
def test_a_built_header_is_read_back(
    table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], scratch: Path
) -> None:
    """build_header and read_header are inverses, names in any script; data begins at a multiple of eight."""
    layout = [(name, dtype, shape) for name, (dtype, shape) in table.items()]
    raw = build_header(layout, metadata)
    sizes = [tensor_bytes(dtype, shape) for _, dtype, shape in layout]
    path = scratch / "built.safetensors"
    write_tensors(path, raw, [os.urandom(size) for size in sizes])
    header = read_header(path)
    assert (header.raw, dict(header.metadata), len(raw) % 8) == (raw, metadata, 0)
    found = {info.name: (info.dtype, info.shape, info.size_bytes) for info in header.tensors}
    assert found == {name: (dtype, shape, tensor_bytes(dtype, shape)) for name, dtype, shape in layout}


def test_the_library_reads_what_is_written_and_the_reverse(tmp_path: Path) -> None:
    """The safetensors library and this module agree on every dtype torch has, both ways."""
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(getattr(torch, torch_name)) for name, torch_name in
        module.TORCH_NAMES.items()
    }  # fmt: skip
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    safetensors.torch.save_file(tensors, theirs / "model.safetensors")
    opened = Checkpoint.open(theirs)
    assert set(opened) == set(tensors)
    for name, tensor in tensors.items():
        assert opened[name].dtype == name
        assert torch.equal(opened.read_tensor(name), tensor)
    ours.mkdir()
    layout = [(name, name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    data = [module.tensor_to_bytes(tensor) for tensor in tensors.values()]
    write_tensors(ours / "model.safetensors", build_header(layout, {"format": "pt"}), data)
    loaded = safetensors.torch.load_file(ours / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_many_duplicates_are_refused_in_time(tmp_path: Path) -> None:
    """A header with 100,000 names of which the last stands twice is refused in a second, not in an hour."""
    one = b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    parts = [one % number for number in range(100_000)]
    put(tmp_path, sealed(b"{" + b",".join([*parts, parts[-1]]) + b"}"))
    script = f"from surgery.checkpoint import Checkpoint; Checkpoint.open({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert "stands twice" in run.stderr


def test_rows_come_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """row_chunks cuts at rows only, whatever the buffer, and gives every byte once."""
    layout = [("w", "F32", (7, 3))]
    data = bytes(range(84))
    write_tensors(tmp_path / "model.safetensors", build_header(layout, {}), [data])
    for buffer in (1, 12, 13, 25, 1000):
        monkeypatch.setattr(checkpoint, "CHUNK_BYTES", buffer)
        parts = [(first, bytes(chunk)) for first, chunk in Checkpoint.open(tmp_path).row_chunks("w")]
        assert all(len(chunk) % 12 == 0 for _, chunk in parts)
        assert b"".join(chunk for _, chunk in parts) == data
        assert [first for first, _ in parts] == [sum(len(c) // 12 for _, c in parts[:n]) for n in range(len(parts))]


def test_a_file_that_shrinks_while_read_is_damaged(tmp_path: Path) -> None:
    """A tensor that is no longer all there is an error, not a short read."""
    path = put(tmp_path)
    opened = Checkpoint.open(tmp_path)
    with path.open("r+b") as file:
        file.truncate(len(VALID) - 2)
    with pytest.raises(DamagedError, match="ended while being read"):
        opened.read_tensor("b")
    with pytest.raises(DamagedError, match="ended while being read"):
        opened.sha256("b")


# --- folders, indexes


def shard(name: str, value: int = 0) -> bytes:
    """A file with one U8 tensor of one value."""
    return sealed(b'{"%s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' % name.encode(), bytes([value]))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    folder = tmp_path / "sharded"
    put(folder, shard("a", 1), "model-00001-of-00002.safetensors")
    put(folder, shard("b", 2), "model-00002-of-00002.safetensors")
    put_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    """Tensors of all shards stand in one mapping, each with its file."""
    opened = Checkpoint.open(sharded)
    assert {name: info.file[:11] for name, info in opened.items()} == {"a": "model-00001", "b": "model-00002"}
    assert opened.is_sharded
    assert [opened.read_tensor(name).item() for name in opened] == [1, 2]


def test_a_single_file_comes_before_an_index(sharded: Path) -> None:
    """With both in a folder the file that from_pretrained takes is taken: model.safetensors."""
    put(sharded, shard("only", 3))
    assert list(Checkpoint.open(sharded)) == ["only"]


def test_a_tensor_the_index_forgot_is_kept(sharded: Path) -> None:
    """What stands in a shard belongs to the checkpoint, named by the index or not: nothing is lost by a stale index."""
    put_index(sharded, {"a": "model-00001-of-00002.safetensors"})
    put(sharded, sealed(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"mtp":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"xy",
    ), "model-00001-of-00002.safetensors")  # fmt: skip
    assert set(Checkpoint.open(sharded)) == {"a", "mtp"}


@pytest.mark.parametrize(
    "weight_map",
    (
        {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
        {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"},
        {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00003.safetensors"},
        {"a": "sub/model.safetensors"},
        {"a": ""},
        {"a": "."},
        {"a": 1},
        {"a": None},
        {"a": ["model-00001-of-00002.safetensors"]},
        {},
        [],
        "model-00001-of-00002.safetensors",
        None,
    ),
    ids=str,
)
def test_an_index_unlike_the_headers_is_damaged(weight_map: object, sharded: Path) -> None:
    """Wrong file, unknown tensor, missing shard, no map at all: each is refused."""
    put_index(sharded, weight_map)
    with pytest.raises(DamagedError):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"weight_map":{"a":"x","a":"y"}}'))
def test_an_index_that_is_no_json_object_is_damaged(text: bytes, sharded: Path) -> None:
    """The index is held to the same rules as a header."""
    put(sharded, text, "model.safetensors.index.json")
    with pytest.raises(DamagedError):
        Checkpoint.open(sharded)


def test_one_tensor_in_two_shards_is_damaged(sharded: Path) -> None:
    """Nothing tells which of the two is meant."""
    put(sharded, shard("a"), "model-00002-of-00002.safetensors")
    put_index(sharded, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(DamagedError, match="stands in"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "file",
    (
        "../outside.safetensors",
        "x/../../outside.safetensors",
        "sub/../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "ABSOLUTE",
        "nul\x00.safetensors",
        "half\ud800.safetensors",
        "n" * 5000,
        "x/" * 3000 + "y",
    ),
    ids=lambda file: ascii(file[:30]),
)
def test_an_index_that_points_elsewhere_is_refused(file: str, sharded: Path) -> None:
    """`..`, absolute paths and names that no file can have are refused with exit code 4, also where a file is there."""
    put(sharded.parent, shard("a"), "outside.safetensors")
    put_index(sharded, {"a": str(sharded / "model-00001-of-00002.safetensors") if file == "ABSOLUTE" else file})
    with pytest.raises(SurgeryError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.exit_code == 4
    str(caught.value).encode()
    if len(file) < 100 and file.isprintable():
        assert isinstance(caught.value, PathEscapeError)


@pytest.mark.parametrize("kind", ("file", "folder", "chain", "index", "loop"))
def test_links_that_leave_the_folder_are_refused(kind: str, sharded: Path, tmp_path: Path) -> None:
    """A link out of the folder is refused wherever it stands; a loop is no file."""
    first, outside = sharded / "model-00001-of-00002.safetensors", tmp_path / "outside"
    outside.mkdir()
    shutil.copy(first, outside / first.name)
    shutil.copy(sharded / "model.safetensors.index.json", outside)
    if kind == "folder":
        (sharded / "sub").symlink_to(outside)
        put_index(sharded, {"a": f"sub/{first.name}"})
    else:
        first.unlink()
        if kind == "chain":
            (sharded / "hop").symlink_to(outside / first.name)
        target = {"file": outside / first.name, "chain": sharded / "hop", "loop": first}.get(kind)
        if target:
            first.symlink_to(target)
        else:
            shutil.copy(outside / first.name, first)
            (sharded / "model.safetensors.index.json").unlink()
            (sharded / "model.safetensors.index.json").symlink_to(outside / "model.safetensors.index.json")
    with pytest.raises((DamagedError, PathEscapeError) if kind == "loop" else PathEscapeError):
        Checkpoint.open(sharded)


def test_links_inside_the_folder_are_fine(sharded: Path) -> None:
    """A link to a neighbour leaves nothing."""
    first = sharded / "model-00001-of-00002.safetensors"
    first.rename(sharded / "real.safetensors")
    first.symlink_to("real.safetensors")
    assert set(Checkpoint.open(sharded)) == {"a", "b"}


def test_the_hub_s_cache_layout_is_read(tmp_path: Path) -> None:
    """A snapshot's links into its own blobs are allowed, links to anything else are not."""
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "0123", tmp_path / "models--org--name" / "blobs"
    put(blobs, VALID, "aaaa")
    put(blobs, b"{}", "bbbb")
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/aaaa")
    (snapshot / "config.json").symlink_to("../../blobs/bbbb")
    opened = Checkpoint.open(snapshot)
    assert opened.read_tensor("b").tolist() == [16, 17, 18]
    assert opened.small_files() == ["config.json"]
    put(tmp_path, VALID, "secret")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../secret")
    with pytest.raises(PathEscapeError):
        Checkpoint.open(snapshot)


def test_blobs_that_are_a_link_allow_nothing_new(tmp_path: Path) -> None:
    """A folder that only looks like the hub's cache cannot open the rest of the disk by linking its blobs away."""
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere, VALID, "secret")
    snapshot = tmp_path / "m" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "m" / "blobs").symlink_to(elsewhere)
    (snapshot / "model.safetensors").symlink_to("../../blobs/secret")
    with pytest.raises(PathEscapeError):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(
    ("files", "error", "text"),
    (
        ({"pytorch_model.bin": b"\x80\x02"}, NotAModelError, "pickle"),
        ({"pytorch_model-00001-of-00002.bin": b"\x80\x02"}, NotAModelError, "pickle"),
        ({"consolidated.00.pth": b"\x80\x02"}, NotAModelError, "pickle"),
        ({"model-00001-of-00002.safetensors": VALID}, DamagedError, "without model.safetensors.index.json"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": VALID}, NotAModelError, "a PEFT adapter"),
        ({"config.json": b"{}"}, NotAModelError, "no model.safetensors"),
        ({}, NotAModelError, "no model.safetensors"),
    ),
)
def test_folders_that_hold_no_checkpoint_say_what_they_hold(
    files: dict[str, bytes], error: type[SurgeryError], text: str, tmp_path: Path
) -> None:
    """Pickle files, shards without index, a PEFT adapter, an empty folder: each has its own sentence."""
    for name, data in files.items():
        put(tmp_path, data, name)
    with pytest.raises(error, match=text):
        Checkpoint.open(tmp_path)


def test_no_folder_and_a_file_are_no_checkpoint(tmp_path: Path) -> None:
    """A path that is not a folder is refused as a request, exit code 2."""
    for path in (tmp_path / "absent", put(tmp_path)):
        with pytest.raises(NotAModelError, match="no such folder") as caught:
            Checkpoint.open(path)
        assert caught.value.exit_code == 2


def test_folders_in_place_of_files_are_damaged(tmp_path: Path) -> None:
    """A folder under a file's name is an error of ours."""
    (tmp_path / "one" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "two" / "model.safetensors.index.json").mkdir(parents=True)
    for name in ("one", "two"):
        with pytest.raises(DamagedError):
            Checkpoint.open(tmp_path / name)


def test_small_files_are_carried_and_weights_are_not(tmp_path: Path) -> None:
    """Configuration, tokenizer, template and licence files; no weights, no index, no hidden file, no record of ours."""
    carried = ["1_Pooling/config.json", "LICENSE.md", "chat_template.jinja", "config.json", "modeling_x.py",
               "tokenizer.json", "tokenizer.model", "vocab.txt"]  # fmt: skip
    for name in [*carried, "model.safetensors.index.json", "surgery.json", "pytorch_model.bin", ".hidden.json",
                 "onnx/model.onnx", "onnx/config.json", "adapter_config.json"]:  # fmt: skip
        path = tmp_path / name
        put(path.parent, b"{}", path.name)
    put(tmp_path)
    assert Checkpoint.open(tmp_path).small_files() == carried


# --- splitting


@PROPERTY
@given(sizes=st.lists(st.integers(0, 100), max_size=20), limit=st.integers(1, 120))
def test_shards_hold_every_name_once_in_order(sizes: list[int], limit: int) -> None:
    """Order is kept, no shard is empty, none is too large unless it is one tensor, none could have taken the next."""
    table = {str(number): size for number, size in enumerate(sizes)}
    shards = split_shards(table, limit)
    assert [name for names in shards for name in names] == list(table)
    assert all(shards)
    totals = [sum(table[name] for name in names) for names in shards]
    assert all(total <= limit or len(names) == 1 for total, names in zip(totals, shards, strict=True))
    assert all(total + table[following[0]] > limit for total, following in zip(totals, shards[1:], strict=False))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    (("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("96MiB", 96 << 20), ("1.5 KB", 1500), ("7", 7), ("2T", 2 * 10**12)),
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    """Decimal and binary units, any case, fractions, plain bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ("", "GB", "-5GB", "5 apples", "0", "0.4", "0.0001KB", "1e3", "nan", "9" * 400, "5XB"))
def test_what_is_no_size_is_refused(text: str) -> None:
    """Zero, less than a byte, negative and huge numbers are no sizes."""
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_a_disk_too_small_is_said_before_writing(tmp_path: Path) -> None:
    """The error has exit code 4; the folder need not exist yet."""
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match="bytes free") as caught:
        require_disk(tmp_path / "not" / "yet", 1 << 60)
    assert caught.value.exit_code == 4


# --- writing


def beside(out: Path) -> list[str]:
    """What stands beside an output, hidden files too."""
    return sorted(path.name for path in out.parent.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """While it is written nothing stands under its name; afterwards only it does."""
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out) as writer:
        (writer.path / "x").write_text("1")
        assert not out.exists()
    assert beside(out) == ["out"]
    assert (out / "x").read_text() == "1"


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt, SystemExit, MemoryError))
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    """Whatever goes wrong while writing, the output is absent and no temporary folder stays."""
    with pytest.raises(error), CheckpointWriter(tmp_path / "out"):
        raise error
    assert beside(tmp_path / "out") == []


def test_a_failed_check_leaves_nothing(tmp_path: Path) -> None:
    """The check sees the finished folder; if it raises, the folder never appears."""
    seen = []

    def check(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), CheckpointWriter(tmp_path / "out", check=check) as writer:
        (writer.path / "x").write_text("1")
    assert (seen, beside(tmp_path / "out")) == ([["x"]], [])


@pytest.mark.parametrize("kind", ("folder", "empty folder", "file", "dangling link"))
def test_what_exists_is_never_overwritten_silently(kind: str, tmp_path: Path) -> None:
    """Anything under the output's name is refused before a byte is written."""
    out = tmp_path / "out"
    if kind == "folder":
        put(out, b"mine", "x")
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="it exists"), CheckpointWriter(out):
        pytest.fail("it was entered")
    assert beside(out) == ["out"]


def test_overwriting_replaces_all_of_it(tmp_path: Path) -> None:
    """With overwrite=True the old folder is gone, files that the new one lacks included."""
    out = put(tmp_path / "out", b"old", "old").parent
    put(out, b"{}", RECORD_FILE)
    with CheckpointWriter(out, overwrite=True) as writer:
        (writer.path / "new").write_text("new")
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert beside(out) == ["out"]


def test_only_a_folder_of_ours_is_overwritten(tmp_path: Path) -> None:
    """overwrite=True deletes what surgery made, or an empty folder, and nothing else: no folder, no file of others."""
    out = put(tmp_path / "out", b"mine", "thesis").parent
    for path in (out, out / "thesis"):
        with pytest.raises(OutputExistsError, match="Remove it yourself"), CheckpointWriter(path, overwrite=True):
            pass
    assert (out / "thesis").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    with CheckpointWriter(tmp_path / "empty", overwrite=True) as writer:
        (writer.path / "new").write_text("new")
    assert (tmp_path / "empty" / "new").exists()


def test_overwriting_a_link_leaves_its_target(tmp_path: Path) -> None:
    """The link is replaced, not what it points to."""
    target = put(tmp_path / "target", b"mine", "x").parent
    put(target, b"{}", RECORD_FILE)
    (tmp_path / "out").symlink_to(target)
    with CheckpointWriter(tmp_path / "out", overwrite=True) as writer:
        (writer.path / "new").write_text("new")
    assert not (tmp_path / "out").is_symlink()
    assert (target / "x").read_bytes() == b"mine"


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while writing, or in the very rename, leaves the old folder under its name."""
    out = put(tmp_path / "out", b"old", "old").parent
    put(out, b"{}", RECORD_FILE)
    with pytest.raises(RuntimeError), CheckpointWriter(out, overwrite=True):
        raise RuntimeError
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"), CheckpointWriter(out, overwrite=True):
        pass
    assert (beside(out), (out / "old").read_bytes()) == (["out"], b"old")


WAITING_WRITER = """
import sys
from surgery.writing import CheckpointWriter
from surgery.errors import OutputExistsError
try:
    with CheckpointWriter(sys.argv[1]) as writer:
        (writer.path / "x").write_text("child")
        print("writing", flush=True)
        sys.stdin.readline()
except OutputExistsError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


@pytest.fixture
def waiting_writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `tmp_path/out`; a line on its stdin lets it go on."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING_WRITER, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_of_two_writers_the_second_gets_an_error(tmp_path: Path, waiting_writer: subprocess.Popen[str]) -> None:
    """Two processes write one folder: the first to finish has it whole, the other is told, and nothing else stays."""
    with CheckpointWriter(tmp_path / "out") as writer:
        (writer.path / "x").write_text("parent")
        assert len(beside(tmp_path / "out")) == 2
    output, _ = waiting_writer.communicate("go\n", timeout=20)
    assert (waiting_writer.returncode, "it exists" in output) == (2, True)
    assert beside(tmp_path / "out") == ["out"]
    assert (tmp_path / "out" / "x").read_text() == "parent"


def test_a_killed_writer_leaves_no_output_and_the_next_clears_up(
    tmp_path: Path, waiting_writer: subprocess.Popen[str]
) -> None:
    """After kill -9 the output is absent; the next writer removes the leftovers."""
    os.kill(waiting_writer.pid, signal.SIGKILL)
    waiting_writer.wait(timeout=20)
    assert len(beside(tmp_path / "out")) == 1
    assert not (tmp_path / "out").exists()
    with CheckpointWriter(tmp_path / "out"):
        pass
    assert beside(tmp_path / "out") == ["out"]


def test_a_live_writer_s_files_are_left_alone(tmp_path: Path, waiting_writer: subprocess.Popen[str]) -> None:
    """Clearing up never touches a process that still runs, nor another machine's files on a shared disk."""
    other_host = tmp_path / ".out.another-host.999999999.partial"
    other_host.mkdir()
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out"):
        raise RuntimeError
    assert len(beside(tmp_path / "out")) == 2
    assert other_host.exists()
    assert waiting_writer.poll() is None


@pytest.mark.parametrize("name", ("out", "out[1]", "*", "a.b.c"))
def test_leftovers_are_found_under_any_name(name: str, tmp_path: Path) -> None:
    """Names with glob characters are cleared up too, and only their own leftovers."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid = dead.stdout.decode().strip()
    mine, other = (tmp_path / f".{stem}.{socket.gethostname()}.{pid}.partial" for stem in (name, "other"))
    put(mine, b"1", "x")
    put(other, b"1", "x")
    with CheckpointWriter(tmp_path / name):
        pass
    assert (mine.exists(), other.exists()) == (False, True)


def test_leftovers_under_one_s_own_process_id_are_cleared(tmp_path: Path) -> None:
    """In a container a restarted process has the id of the one that was killed: its leftovers are no live writer."""
    put(tmp_path / f".out.{socket.gethostname()}.{os.getpid()}.partial", b"1", "x")
    with CheckpointWriter(tmp_path / "out") as writer:
        assert list(writer.path.iterdir()) == []
    assert beside(tmp_path / "out") == ["out"]


def test_one_process_cannot_write_one_folder_twice_at_once(tmp_path: Path) -> None:
    """The second is refused, the first is not disturbed."""
    with CheckpointWriter(tmp_path / "out") as writer:
        (writer.path / "x").write_text("1")
        with pytest.raises(OutputExistsError, match="already writing"), CheckpointWriter(tmp_path / "out"):
            pytest.fail("it was entered")
        assert (writer.path / "x").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"


def test_replacing_a_file_that_cannot_be_written_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure before the rename leaves the old content and no temporary file."""
    path = put(tmp_path, b"old", "x")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert (path.read_bytes(), [p.name for p in tmp_path.iterdir()]) == (b"old", ["x"])


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@PROPERTY
@given(sizes=st.lists(st.lists(st.integers(0, 40), max_size=4), max_size=6))
def test_pieces_land_where_they_belong(sizes: list[list[int]], scratch: Path) -> None:
    """Whatever the pieces and their chunks, a file is its header and its data in order; so is the next one."""
    pieces = [[os.urandom(size) for size in piece] for piece in sizes]
    starts = [sum(map(sum, sizes[:number])) for number in range(len(sizes))]
    header = b"header"
    with StreamWriter() as writer:
        for name in ("one", "two"):
            writer.write(scratch / name, header, list(zip(starts, pieces, strict=True)))
    for name in ("one", "two"):
        assert (scratch / name).read_bytes() == header + b"".join(b"".join(piece) for piece in pieces)


def test_a_piece_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """An exception in one piece reaches the caller, whatever the others do."""

    def broken() -> Iterator[bytes]:
        yield b"ab"
        raise DamagedError("a tensor", "it is not what it was")

    pieces: list[tuple[int, Iterable[bytes]]] = [(0, [b"abc"]), (3, broken()), (9, [b"x"] * 9)]
    with pytest.raises(DamagedError), StreamWriter() as writer:
        writer.write(tmp_path / "x", b"header", pieces)


@pytest.mark.parametrize("call", ("fsync", "fdatasync"))
def test_a_disk_that_fails_later_is_an_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk refuses in the background, the caller learns before the file counts as written."""

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(writing.os, call, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_tensors(tmp_path / "x", b"header", [b"abc", b"def"])


def test_a_full_disk_leaves_nothing(full_disk: Path) -> None:
    """The disk fills up in the middle of a file: the error says so, and every byte is given back."""
    free = shutil.disk_usage(full_disk).free
    header = build_header([("a", "U8", (1 << 20,))], {})
    chunks = (bytes(1 << 14) for _ in range(64))
    with pytest.raises(OSError, match="No space left"), CheckpointWriter(full_disk / "out") as writer:
        write_tensors(writer.path / "model.safetensors", header, chunks)
    assert list(full_disk.iterdir()) == []
    assert shutil.disk_usage(full_disk).free == free
