"""A drawn data set's folder: who may write into it, and one shard at a time.

What comes in: a description of what shall be drawn, then samples. What goes out: shards, and the description beside
them. Surprise: drawing goes on where it was interrupted. A shard, and the description, have their names only once they
are whole, so what has its name is never drawn twice.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from webdataset import TarWriter

from phi3v_dist.errors import DataError

JPEG_QUALITY = 90
ImageFormat = Literal["jpeg", "png"]


def claim(out: Path, name: str, description: Mapping[str, Any]) -> Path:
    """Make sure the folder is empty or of this data set; returns the description that marks it as unfinished.

    Args:
        name: of the description, `catalogue.json` for example.
        description: must hold `version` and `settings`, by which a folder is known again.

    Raises:
        DataError: the folder holds shards of something else.
    """
    finished, unfinished = out / name, out / f"{name}.partial"
    written = json.loads(json.dumps(description))  # as it will be read again: tuples are lists
    for path in (finished, unfinished):
        if path.exists():
            found = json.loads(path.read_text())
            other = [key for key, value in written["settings"].items() if found["settings"].get(key) != value]
            other += ["version"] if found["version"] != written["version"] else []
            if other:
                raise DataError(
                    f"{out}: holds a {Path(name).stem} with other settings ({', '.join(other)}); choose another "
                    "folder, or delete this one"
                )
    if not finished.exists() and not unfinished.exists() and any(out.glob("*.tar")):
        raise DataError(f"{out}: holds shards but no {name}, so they are not ours; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(written, indent=2) + "\n")
    return unfinished


def write_shard(shard: Path, samples: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Write one tar under a temporary name and give it its own at the end; yields the number of samples written."""
    partial = shard.with_name(f"{shard.name}.partial")
    with partial.open("wb") as file, TarWriter(file, mtime=0) as writer:  # the writer's clock would change every byte
        for number, sample in enumerate(samples, start=1):
            writer.write(dict(sample))
            yield number
    partial.replace(shard)


def encode_photo(photo: Image.Image, image_format: ImageFormat) -> bytes:
    """The picture as a file. JPEG is written at quality 90 with 4:2:0 colour."""
    file = io.BytesIO()
    options = {"quality": JPEG_QUALITY, "subsampling": "4:2:0"} if image_format == "jpeg" else {}
    photo.save(file, format=image_format, **options)
    return file.getvalue()
