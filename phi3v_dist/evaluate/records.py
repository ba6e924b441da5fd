"""What an evaluation leaves on disk: scores, every prediction with its truth, thumbnails.

What comes in: the rows of all ranks. What goes out: `eval/step-…/` with `scores.json`, `predictions.jsonl`,
`highest_loss.jsonl` and `thumbnails/`, complete or not there. Surprise: the report and W&B read these files and
nothing else.
"""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phi3v_dist.evaluate.highest_loss import NUM_KEPT

THUMBNAIL_PX = 384
PREDICTIONS_NAME = "predictions.jsonl"
HIGHEST_LOSS_NAME = "highest_loss.jsonl"
HIGHEST_LOSS_KEYS = ("shard", "key", "loss", "prompt", "target", "thumbnail", "tokens")


def write_records(folder: Path, rows: list[dict[str, Any]], metrics: dict[str, float]) -> None:
    """Write one evaluation. `thumbnail` of a row holds JPEG bytes or None here, and a path in the file; `tokens` those
    of the samples that may be among the highest losses."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "thumbnails").mkdir(parents=True)
    highest: list[dict[str, Any]] = []
    with open(partial / PREDICTIONS_NAME, "w") as file:
        for row in rows:
            picture = row["thumbnail"]
            name = f"thumbnails/{row['sample_id']:08d}.jpg"
            if picture is not None:
                (partial / name).write_bytes(picture)
            line = {key: value for key, value in row.items() if key != "tokens"}
            file.write(json.dumps(line | {"thumbnail": name if picture is not None else None}) + "\n")
            if row.get("tokens"):
                highest.append(row | {"thumbnail": name if picture is not None else None})
    highest.sort(key=_badness, reverse=True)  # rows of equal loss stay in their order
    lines = [json.dumps(_highest(row), allow_nan=False) for row in highest[:NUM_KEPT]]
    (partial / HIGHEST_LOSS_NAME).write_text("".join(f"{line}\n" for line in lines))
    (partial / "scores.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # an evaluation repeated after a restart replaces the earlier one
    partial.rename(folder)


def _highest(row: dict[str, Any]) -> dict[str, Any]:
    """A line of `highest_loss.jsonl`; a loss that is not finite is null there."""
    return {key: row[key] for key in HIGHEST_LOSS_KEYS} | {"loss": row["loss"] if _badness(row) < math.inf else None}


def _badness(row: dict[str, Any]) -> float:
    """What is not finite comes first."""
    loss = row["loss"]
    return math.inf if loss is None or math.isnan(loss) else float(loss)


def thumbnail(image: np.ndarray) -> bytes:
    """A picture [height, width, 3] as a small JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
