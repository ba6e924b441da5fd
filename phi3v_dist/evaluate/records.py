"""What an evaluation leaves on disk: scores, every prediction with its truth, thumbnails.

What comes in: the rows of all ranks. What goes out: `eval/step-…/` with `scores.json`, `predictions.jsonl` and
`thumbnails/`, complete or not there. Surprise: the report and W&B read these files and nothing else.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

THUMBNAIL_PX = 384


def write_records(folder: Path, rows: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """Write one evaluation. `thumbnail` of a row holds JPEG bytes or None here, and a path in the file."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "thumbnails").mkdir(parents=True)
    with open(partial / "predictions.jsonl", "w") as file:
        for row in rows:
            picture = row["thumbnail"]
            name = f"thumbnails/{row['sample_id']:08d}.jpg"
            if picture is not None:
                (partial / name).write_bytes(picture)
            file.write(json.dumps(row | {"thumbnail": name if picture is not None else None}) + "\n")
    (partial / "scores.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # an evaluation repeated after a restart replaces the earlier one
    partial.rename(folder)


def thumbnail(image: np.ndarray) -> bytes:
    """A picture [height, width, 3] as a small JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
