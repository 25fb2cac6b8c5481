"""Images: rows to pixels, batch by batch, when they are needed.

What is kept of a row is its encoded bytes, or the file that they lie in; the checkpoint's own image processor decodes,
scales and normalises. It runs on Pillow everywhere, so that every machine gives a model the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import DataError, RequestError, shorten
from surgery.examples import Cells, Pictured
from surgery.lookup import require_extra
from surgery.rows import image_files

if TYPE_CHECKING:
    from torch import Tensor

TASK = "image-classification"
PROCESSOR_FILE = "preprocessor_config.json"


def require_pillow() -> None:
    """Raises: UnsupportedError."""
    require_extra("images", "PIL")


def read_processor(folder: Path) -> Any:
    """A model folder's image processor. Raises: RequestError, UnsupportedError."""
    require_pillow()
    from surgery.compat import load_image_processor, quiet_loading

    if not (folder / PROCESSOR_FILE).is_file():
        raise RequestError(str(folder), f"no {PROCESSOR_FILE}", expected="the base's", fix="Fetch the base again")
    try:
        with quiet_loading():
            return load_image_processor(folder)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        found = f"its image processor does not load ({shorten(str(error), 160)})"
        raise RequestError(str(folder), found, expected=f"the base's {PROCESSOR_FILE}") from error


def read_pictured(cells: Cells) -> Pictured:
    """A row: an image as a path, as bytes, or as the hub's struct of both. Raises: DataError."""
    value = cells.value("image")
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if isinstance(data, bytes):
        return Pictured(cells.row.place, data, cells.value("label"))
    if isinstance(path, str):
        return Pictured(path, b"", cells.value("label"))
    raise cells.wrong("image", f"{value!r:.60}", expected="an image: a path, bytes, or a struct of bytes and path")


def encode_pictured(example: Pictured, *, label: int) -> dict[str, Any]:
    """What is kept of a row: its bytes (none where it is a file), its place, its label. Raises: DataError."""
    _open(example.image, example.place).close()  # its header; the rest is read when it is needed
    return {"image": example.image, "place": example.place, "labels": label}


def _open(data: bytes, place: str) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data) if data else place)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(place, error) from error


def _unreadable(place: str, error: Exception) -> DataError:
    return DataError(
        place, f"found an image that cannot be read ({shorten(str(error), 120)})", expected="an image file"
    )


def _decoded(data: bytes, place: str) -> Any:
    with _open(data, place) as image:
        try:
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # what is cut off or damaged behind the header
            raise _unreadable(place, error) from error


def image_collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows to a batch: pixel_values (batch, channels, height, width) and labels (batch,)."""
    import torch

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [_decoded(row["image"], row["place"]) for row in rows]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


def mirrored(pixels: Tensor, rows: Sequence[int], *, seed: int, step: int) -> Tensor:
    """Each image as it is, or left for right, by (seed, step, row): a resumed run draws what an uninterrupted one does.

    Shapes: pixels (batch, channels, height, width), returned alike.
    """
    import torch

    drawn = [random.Random(f"{seed}/mirrored/{step}/{row}").random() < 0.5 for row in rows]
    chosen = torch.tensor(drawn, device=pixels.device)[:, None, None, None]
    return torch.where(chosen, pixels.flip(-1), pixels)


def folder_digest(folder: Path) -> str:
    """What a folder of images is, by names and sizes: reading them all would take as long as an epoch."""
    digest = hashlib.sha256()
    for path in image_files(folder):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
