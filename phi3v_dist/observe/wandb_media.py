"""The answers of one evaluation → a table and a list of pictures in a W&B run.

Surprise: the pictures are logged twice, since an offline table keeps its own outside the run's folder
(OBSERVABILITY.md §0.5).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v_dist.observe.metrics import STEP
from phi3v_dist.observe.tracker import Prediction

MEDIA_ROWS = 64  # pictures per evaluation; more make the offline folder and the web page heavy


def log_media(run: Any, step: int, predictions: Sequence[Prediction], folder: Path) -> None:
    """folder: to which the thumbnails' paths are relative."""
    shown = predictions[:MEDIA_ROWS]
    pictures = [_picture(prediction, folder) for prediction in shown]
    images = _images(pictures, [prediction["prediction"] for prediction in shown])
    run.log(
        {
            STEP: step,
            "eval/predictions": _table(shown, images),
            "eval/images": [image for image in images if image],
        }
    )


def _picture(prediction: Prediction, folder: Path) -> Image.Image | None:
    if not prediction["thumbnail"] or not (folder / prediction["thumbnail"]).exists():
        return None
    return Image.open(folder / prediction["thumbnail"]).convert("RGB")


def _images(pictures: Sequence[Image.Image | None], captions: Sequence[str]) -> list[Any]:
    """All of one size, on white: W&B shows pictures of several sizes wrongly, and says so at every evaluation."""
    import wandb

    width, height = (max((picture.size[side] for picture in pictures if picture), default=0) for side in (0, 1))
    found: list[Any] = []
    for picture, caption in zip(pictures, captions, strict=True):
        if picture is None:
            found.append(None)
            continue
        sheet = Image.new("RGB", (width, height), "white")
        sheet.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        found.append(wandb.Image(sheet, caption=caption, file_type="jpg"))
    return found


def _table(predictions: Sequence[Prediction], images: Sequence[Any]) -> Any:
    """One row per answer: the texts, then per field its error (numbers) or whether it is right (words)."""
    import wandb

    fields = list(dict.fromkeys(name for prediction in predictions for name in prediction["fields"]))
    table = wandb.Table(columns=["image", "prompt", "target", "prediction", "blind", "fields_ok", *fields])
    for prediction, image in zip(predictions, images, strict=True):
        scores = [prediction["fields"].get(name) for name in fields]
        verdicts = [score and (score["error"] if score["kind"] == "number" else score["correct"]) for score in scores]
        blind = prediction["blind"] and prediction["blind"]["prediction"]
        fields_ok = sum(bool(score and score["correct"]) for score in scores)
        texts = [prediction[name] for name in ("prompt", "target", "prediction")]
        table.add_data(image, *texts, blind, fields_ok, *verdicts)
    return table
