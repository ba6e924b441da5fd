"""A run folder as training leaves it, made in a second: for the tests, and for looking at the report.

    python tests/observe/synthetic_run.py /tmp/synthetic_run && python launch/report.py /tmp/synthetic_run

Surprise: the first attempt is killed at 340 of 600 steps, in the middle of a line, and the second starts again at 301.
"""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from phi3v_dist.evaluate.controls import answer_score, read_judged, with_controls

STEPS, KILLED_AT, RESUMED_AT, EVERY_EVAL = 600, 340, 301, 150
CATEGORIES = ("coats", "dresses", "knitwear", "scarves", "shirts", "trousers")
COLOURS = {"beige": "#c8ad7f", "navy": "#1f2a44", "red": "#b3262e", "green": "#3f6b4f", "grey": "#8b8d90"}
BASE_PRICE = {"coats": 1450, "dresses": 890, "knitwear": 560, "scarves": 320, "shirts": 410, "trousers": 470}
NOISE = 38.0  # standard deviation of the price that nothing in the picture explains
BEST_PRICE_MAE = round(NOISE * math.sqrt(2 / math.pi), 2)


def write_run(folder: Path, num_samples: int = 60, evaluations: bool = True, finished: bool = True) -> Path:
    """`evaluations=False`: trained, never evaluated. `finished=False`: killed before its summary was written."""
    folder.mkdir(parents=True)
    folder.joinpath("config.yaml").write_text(yaml.safe_dump(CONFIG))
    rows = [_row(step, 1) for step in range(1, KILLED_AT + 1)]
    rows += [_row(step, 2) for step in range(RESUMED_AT, STEPS + 1)]
    scores: dict[str, float] = {}
    if evaluations:
        _write_evaluation(folder / "eval" / "step-000000", 0, num_samples)
    for step in range(EVERY_EVAL, STEPS + 1, EVERY_EVAL) if evaluations else ():
        scores = _write_evaluation(folder / "eval" / f"step-{step:06d}", step, num_samples)
        last = max(place for place, row in enumerate(rows) if row["train/step"] == step)
        rows.insert(last + 1, {**{name: rows[last][name] for name in ("time", "run/attempt", "train/step")}, **scores})
    lines = [json.dumps(row) + "\n" for row in rows]
    folder.joinpath("metrics.jsonl").write_text("".join(lines) + ("" if finished else '{"time": 1764000'))
    if finished:
        end = {"train/step": STEPS, "run/wall_s": 512.0, "run/attempt": 2, "run/world_size": 2}
        best = {"eval/best_price_mae": BEST_PRICE_MAE} if evaluations else {}
        folder.joinpath("summary.json").write_text(json.dumps({**scores, **best, **end}, indent=1))
    return folder


def _row(step: int, attempt: int) -> dict[str, float]:
    """One training step: loss falling towards a floor, warmup and cosine, and a first attempt with a slow loader."""
    chance = random.Random(step)
    pace_s = 0.74 + 0.05 * chance.random() + (0.5 if step == 1 else 0)
    data_s = 0.02 + 0.03 * chance.random() + (0.12 if attempt == 1 and 180 < step < 260 else 0)
    step_s = pace_s + data_s
    lr = min(step / 40, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    row = {
        "time": 1764000000.0 + 0.85 * step + 60 * (attempt - 1),
        "run/attempt": attempt,
        "train/step": step,
        "train/tokens": 3900 * step,
        "train/samples": 16 * step,
        "train/epoch": 16 * step / 1200,
        "train/loss": 0.34 + 5.1 * math.exp(-step / 75) + 0.08 * chance.gauss(0, 1) * math.exp(-step / 400),
        "train/grad_norm": 0.7 + 4 * math.exp(-step / 60) + 0.3 * chance.random(),
        "train/lr/text": 2e-3 * lr,
        "train/lr/projector": 2e-3 * lr,
        "train/lr/vision": 1e-3 * lr,
        "train/label_token_frac": 0.11,
        "perf/tokens_per_s_per_gpu": 3900 / step_s / 2,
        "perf/images_per_s_per_gpu": 16 / step_s / 2,
        "time/step_s": step_s,
        "time/data_s": data_s,
        "time/fwd_s": 0.31 * pace_s,
        "time/bwd_s": 0.55 * pace_s,
        "time/opt_s": 0.11 * pace_s,
        "data/pack_efficiency": 0.955 + 0.03 * chance.random(),
        "mem/host_rss_gib/max": 1.9,
        "run/world_size": 2,
    }
    return {**row, "ckpt/blocked_s": 0.4, "ckpt/save_s": 0.4} if step % 100 == 0 else row


def _write_evaluation(folder: Path, step: int, num_samples: int) -> dict[str, float]:
    """Predictions with thumbnails, and the scores that follow from them."""
    (folder / "thumbnails").mkdir(parents=True)
    skill, loss = 1 - math.exp(-step / 190), round(0.36 + 4.9 * math.exp(-step / 80), 4)
    predictions = [{**_prediction(n, skill, folder), "loss": loss, "label_tokens": 24} for n in range(num_samples)]
    with (folder / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(prediction) + "\n" for prediction in predictions)
    return write_scores(folder)


def write_scores(folder: Path) -> dict[str, float]:
    """scores.json as the package computes it from the predictions of this folder and of step 0 beside it."""
    judged, base = (list(read_judged(place).values()) for place in (folder, folder.parent / "step-000000"))
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    blind = [answer_score(json.loads(line)["blind"]) for line in lines]
    untuned = base if folder.name != "step-000000" else [None] * len(judged)
    scores = with_controls([replace(one, blind=other) for one, other in zip(judged, blind, strict=True)], untuned)
    folder.joinpath("scores.json").write_text(json.dumps(scores))
    return scores


def _prediction(sample_id: int, skill: float, folder: Path) -> dict[str, Any]:
    chance = random.Random(f"{sample_id}")
    category, colour = CATEGORIES[sample_id % len(CATEGORIES)], chance.choice(list(COLOURS))
    title = f"{colour.title()} {category}" if sample_id else "<script>alert('a title')</script> & more"
    price = round(BASE_PRICE[category] * (1.15 if colour == "navy" else 1) + chance.gauss(0, NOISE))
    truth = {"title": title, "category": category, "price": float(price)}
    thumbnail = f"thumbnails/{sample_id:06d}.jpg"
    _draw(category, COLOURS[colour], chance).save(folder / thumbnail, quality=85)

    def answer(seeing: bool) -> dict[str, Any]:
        sees = seeing and chance.random() < skill * 0.98
        seen = category if sees else chance.choice(CATEGORIES)
        said_colour = colour if sees and chance.random() < 0.96 else chance.choice(list(COLOURS))
        said = {"title": f"{said_colour.title()} {seen}", "category": seen}
        said_price = round(BASE_PRICE[seen] * (1.15 if said_colour == "navy" else 1) / 10) * 10.0
        parsed = chance.random() > 0.012
        fields: dict[str, Any] = {
            name: {"kind": "exact", "target": truth[name], "prediction": said[name] if parsed else None}
            | {"correct": parsed and said[name] == truth[name], "error": None}
            for name in said
        }
        error = abs(said_price - price) if parsed else None
        correct = error is not None and error <= 0.1 * price
        price_field = {"kind": "number", "target": float(price), "prediction": said_price if parsed else None}
        fields["price"] = {**price_field, "correct": correct, "error": error}
        text = f"title: {said['title']}\ncategory: {seen}\nprice: {said_price:.0f}" if parsed else f"title: {colour}"
        return {"prediction": text, "stopped": parsed, "parsed": parsed, "fields": fields, "num_tokens": 24}

    return {
        **{"sample_id": sample_id, "shard": "validation-000000.tar", "key": f"{sample_id:06d}", "source": "catalogue"},
        "prompt": "What is this product? Give its title, its category and its price.",
        "target": f"title: {title}\ncategory: {category}\nprice: {price}",
        **{**answer(seeing=True), "thumbnail": thumbnail, "blind": answer(seeing=False)},
    }


def _draw(category: str, colour: str, chance: random.Random) -> Image.Image:
    """The outline of a garment on a pale ground: enough to tell the categories apart in the gallery."""
    outlines = {
        "coats": [(35, 20), (65, 20), (85, 40), (78, 95), (22, 95), (15, 40)],
        "dresses": [(40, 12), (60, 12), (57, 45), (80, 92), (20, 92), (43, 45)],
        "knitwear": [(35, 25), (65, 25), (92, 60), (80, 66), (68, 50), (68, 82), (32, 82), (32, 50), (20, 66), (8, 60)],
        "scarves": [(42, 8), (58, 8), (62, 92), (38, 92)],
        "shirts": [(35, 22), (65, 22), (88, 42), (78, 52), (68, 42), (68, 85), (32, 85), (32, 42), (22, 52), (12, 42)],
        "trousers": [(34, 12), (66, 12), (74, 92), (56, 92), (50, 40), (44, 92), (26, 92)],
    }
    size, shift = 240, chance.uniform(-3, 3)
    image = Image.new("RGB", (size, size), chance.choice(["#f1ede6", "#e7ebee", "#efe8ea"]))
    points = [((x + shift) * size / 100, y * size / 100) for x, y in outlines[category]]
    ImageDraw.Draw(image).polygon(points, fill=colour, outline="#222222")
    return image


CONFIG: dict[str, Any] = {
    "run": {"name": "quickstart", "seed": 1, "note": "<b>not bold</b>"},
    "data": {
        "train": [{"name": "catalogue", "shards": "data/train-{000000..000007}.tar", "weight": 1.0}],
        "validation": [{"name": "catalogue", "shards": "data/validation-000000.tar"}],
        "row_length_tokens": 2048,
        "packing": True,
    },
    "model": {"folder": "models/tiny", "longrope": "document"},
    "train": {"steps": STEPS, "global_batch_rows": 8, "lr_text": 2e-3, "lr_vision": 1e-3, "clip_grad_norm": 1.0},
    "eval": {"every_steps": EVERY_EVAL, "samples": 240, "max_new_tokens": 48},
    "environment": {
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
        "commit": "3f1c0de5b7",
        "world_size": 2,
    },
}

if __name__ == "__main__":
    write_run(Path(sys.argv[1]), num_samples=240)
