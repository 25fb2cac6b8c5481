"""Writing so that an output is whole or absent: folders appear by rename, files are on the disk when we say so."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import RECORD_FILE
from surgery.errors import OutputExistsError, RequestError, ResourceError

if TYPE_CHECKING:
    from types import TracebackType

WRITERS = 2
FLUSH_BYTES = 64 << 20
WRITE_BYTES = 512 << 10  # larger writes ask the kernel for larger pages, which a virtual machine may have to fetch


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
                count = os.pwrite(descriptor, view[:WRITE_BYTES], offset)
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


def require_new_file(path: Path, *, overwrite: bool = False) -> None:
    """Raises: OutputExistsError for a folder, or a file that is not to be replaced; RequestError without its folder."""
    if path.is_dir():
        raise OutputExistsError(str(path), "a folder", expected="a file", fix="Choose another with -o")
    if os.path.lexists(path) and not overwrite:
        fix = "Choose another with -o or give --overwrite"
        raise OutputExistsError(str(path), "it exists", expected="a new file", fix=fix)
    if not path.parent.is_dir():
        raise RequestError(str(path), f"there is no folder {path.parent}", expected="a file in a folder that exists")


def require_disk(
    folder: Path, needed_bytes: int, *, fix: str = "Free some space or choose another folder with -o"
) -> None:
    """Raises ResourceError where `folder`'s file system has less than `needed_bytes` free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            str(folder),
            f"{free:,} bytes free on its disk",
            expected=f"{needed_bytes:,} bytes",
            fix=fix,
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
