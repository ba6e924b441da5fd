"""What an import wrote → a configuration that trains on it, and the tables a person reads.

Surprise: the configuration is a beginning, not a result. It is written once and never again, so that edits stay.
"""

from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phi3v_dist.data.importers.packing import NUM_CROPS
from phi3v_dist.invocation import as_typed

ROWS_PER_STEP = 8
WHOLE_ANSWER = {"pattern": "(.+)", "kind": "fuzzy"}  # exactly right, and how alike; better ones are up to the data
SHORT_ROW_TOKENS, LONG_ROW_TOKENS = 4096, 131072


def starter_config(out: Path, manifest: dict[str, Any], model: Path | None) -> str:
    """A YAML for launch/train.py: one epoch over the train split, at 4 crops."""
    splits = manifest["splits"]
    longest = max(split["longest_tokens_4"] for split in splits.values())
    row = min(LONG_ROW_TOKENS, max(SHORT_ROW_TOKENS, -(-longest // 1024) * 1024))
    tree = {
        "run": {"name": out.name},
        "model": {"path": str(model) if model else "models/Phi-3.5-vision-instruct"},
        "data": {
            "num_crops": 4, "row_length_tokens": row,
            **{side: [{"shards": f"{out}/{side}-*.tar"}] for side in ("train", "validation") if side in splits},
        },
        "train": {
            "epochs": 1, "rows_per_step": ROWS_PER_STEP,
            "learning_rate": dict.fromkeys(("text", "vision", "projector"), 1e-5),
        },
        **({"eval": {"fields": {"answer": WHOLE_ANSWER}}} if "validation" in splits else {}),
    }  # fmt: skip
    command = f"# {as_typed('deepspeed launch/train.py')} --config {out / 'train.yaml'}\n"
    return f"{command}# Begun by the import; edit it, it is not written again.\n" + yaml.safe_dump(
        tree, sort_keys=False
    )


def tables(out: Path, manifest: dict[str, Any]) -> RenderableType:
    """Samples by split, what was left out, and what to type next."""
    splits = manifest["splits"]
    words = "tokens" if manifest["tokenizer_digest"] else "image tokens"
    table = Table("", *splits, title=Text(f"{manifest['source']} → {out}"), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("shards", "samples", "text_only", "pictures", "size_bytes"):
        shown = _size if name == "size_bytes" else "{:,}".format
        label = {"text_only": "  of them text only", "size_bytes": "size"}.get(name, name)
        table.add_row(label, *(shown(split[name]) for split in splits.values()))
    for num_crops in NUM_CROPS:
        table.add_row(
            f"{words} at {num_crops} crops", *(f"{split[f'tokens_{num_crops}']:,}" for split in splits.values())
        )
        longest = (f"{split[f'longest_tokens_{num_crops}']:,}" for split in splits.values())
        table.add_row("  of the longest sample", *longest)
    records, samples = manifest["records"], manifest["samples"]
    lines = [f"{samples:,} of {records:,} records became samples"]
    if manifest["duplicates"]:
        lines.append(f"{manifest['duplicates']:,} duplicates left out: {out / 'duplicates.jsonl'}")
    if manifest["failures"]:
        lines.append(f"{sum(manifest['failures'].values()):,} bad records: {out / 'failures.jsonl'}")
        lines += [f"  {count:,} x {kind}" for kind, count in manifest["failures"].items()]
    if manifest["pictures_in_several_splits"]:
        lines.append(
            f"{manifest['pictures_in_several_splits']:,} pictures are in more than one split, as `split_key` wants it"
        )
    if not sum(split["pictures"] for split in splits.values()):
        lines.append("no sample has a picture; if they should, name their column by images=…")
    else:
        low, middle, high = manifest["long_side_px"]
        lines.append(f"long side of the pictures: {low:,} to {high:,} px, half of them up to {middle:,} px")
    by_file = manifest["samples_by_file"]
    if 1 < len(by_file) <= 12:
        lines += [f"  {count:,} from {file}" for file, count in by_file.items()]
    if "validation" not in splits:
        lines.append("no validation split: too few samples for its share, or validation_frac=0")
    if "train" not in splits:
        lines.append("no train split: too few samples for its share")
    lines += ["", "what to train with is in train.yaml: look at `model.path` first"]
    lines += [f"next: {as_typed('python launch/check.py')} --config {out / 'train.yaml'}"]
    return Group(table, Text("\n".join(lines), overflow="ignore", no_wrap=True))  # a path can be copied


def _size(size_bytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"
