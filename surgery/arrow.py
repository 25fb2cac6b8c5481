"""Token rows on disk: one Arrow file in a temporary folder of its own, mapped into memory, removed with its last user.

`datasets` caches what it builds by a fingerprint of how it was built, which an edited input file does not change. Sets
written here are new files each time, so nothing stale can come back. The folder lies where TMPDIR says.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

WRITE_ROWS = 1000


def write(rows: Iterator[dict[str, Any]]) -> Path:
    """The new file (absent when there is no row). Lists are of int32; the folder does not outlive an exception."""
    import pyarrow as pa

    folder = Path(tempfile.mkdtemp(prefix="surgery-data-"))
    try:
        first = next(rows, None)
        if first is not None:
            schema = pa.schema([(column, _type_of(value)) for column, value in first.items()])
            with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                everything = chain([first], rows)
                while chunk := list(islice(everything, WRITE_ROWS)):
                    writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / "rows.arrow"


def _type_of(value: object) -> Any:
    import pyarrow as pa

    if isinstance(value, list):
        return pa.list_(pa.int32())
    kinds = {float: pa.float64(), bytes: pa.large_binary(), str: pa.string()}
    return kinds.get(type(value), pa.int64())


def split(file: Path, *, at: int) -> tuple[Dataset, Dataset]:
    """Two new sets, of the rows before `at` and from there on."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        return open_set(write(_rows_of(table.slice(0, at)))), open_set(write(_rows_of(table.slice(at))))


def _rows_of(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=WRITE_ROWS):
        yield from batch.to_pylist()


def open_set(file: Path) -> Dataset:
    """The rows as a data set; the file goes when the set does."""
    from datasets import Dataset

    dataset = Dataset.from_file(str(file))
    weakref.finalize(dataset, _remove_own, file, os.getpid())
    return dataset


def remove(file: Path) -> None:
    """The file and its folder."""
    shutil.rmtree(file.parent, ignore_errors=True)


def _remove_own(file: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked loader must not remove what its parent reads
        remove(file)
