"""What was found and written → import.json, failures.jsonl and duplicates.jsonl.

Surprise: records are numbered from 1 in all of them, and a sample's key is that number, so that a line of a log, of a
list of failures and of the source can be laid side by side.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from phi3v_dist.data.importers.assignment import SPLITS, Assignment, leaks
from phi3v_dist.data.importers.packing import NUM_CROPS
from phi3v_dist.data.importers.records import Source
from phi3v_dist.data.importers.survey import Survey
from phi3v_dist.data.importers.writing import key_of


def list_failures(out: Path, survey: Survey, assignment: Assignment) -> dict[str, int]:
    """Write failures.jsonl and duplicates.jsonl; returns how many records are bad, by kind of reason."""
    kinds: Counter[str] = Counter()
    with _Listing(out / "failures.jsonl") as listing:
        for number, kind, reason in survey.bad():
            kinds[kind] += 1
            listing.write({"record": number + 1, "key": key_of(number), "kind": kind, "reason": reason})
    with _Listing(out / "duplicates.jsonl") as listing:
        for number in np.flatnonzero(assignment.same_as >= 0).tolist():
            first = int(assignment.same_as[number])
            listing.write({"record": number + 1, "key": key_of(number), "kept": key_of(first)})
    return dict(kinds.most_common())


def describe(out: Path, source: Source, survey: Survey, assignment: Assignment) -> dict[str, Any]:
    """The figures of an import whose shards are written."""
    shard = assignment.shard
    sides = np.maximum(survey.column("width"), survey.column("height"))
    in_file = np.bincount(survey.column("file")[shard >= 0], minlength=len(source.files)).tolist()
    return {
        "records": len(shard),
        "samples": int((shard >= 0).sum()),
        "duplicates": int((assignment.same_as >= 0).sum()),
        "pictures_in_several_splits": leaks(survey, assignment),
        "long_side_px": [int(q) for q in np.quantile(sides, (0, 0.5, 1), method="nearest")] if len(sides) else [],
        "samples_by_file": dict(zip(source.files, in_file, strict=True)),
        "splits": _splits(survey, assignment),
        "shards": _shards(out, survey, assignment),
    }


def _splits(survey: Survey, assignment: Assignment) -> dict[str, dict[str, int]]:
    tokens = {f"tokens_{num_crops}": survey.column(f"tokens_{num_crops}") for num_crops in NUM_CROPS}
    sizes, pictures = survey.column("size_bytes"), survey.column("num_pictures")
    splits: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        is_in_split = [assignment.split_of(number) == split for number in range(len(assignment.names))]
        members = np.flatnonzero(np.array([*is_in_split, False])[assignment.shard])  # -1 is the last
        if len(members):
            splits[split] = {
                "shards": sum(is_in_split),
                "samples": len(members),
                "text_only": int((pictures[members] == 0).sum()),
                "pictures": int(pictures[members].sum()),
                "size_bytes": int(sizes[members].sum()),
            }
            for name, column in tokens.items():
                splits[split] |= {name: int(column[members].sum()), f"longest_{name}": int(column[members].max())}
    return splits


def _shards(out: Path, survey: Survey, assignment: Assignment) -> list[dict[str, Any]]:
    is_in = assignment.shard >= 0
    num_samples = np.bincount(assignment.shard[is_in])
    num_pictures = np.bincount(assignment.shard[is_in], survey.column("num_pictures")[is_in])
    shards = []
    for number, name in enumerate(assignment.names):
        with (out / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {"samples": int(num_samples[number]), "pictures": int(num_pictures[number])}
        shards.append({"name": name, "size_bytes": (out / name).stat().st_size, "sha256": digest, **counts})
    return shards


class _Listing:
    """A file of one JSON object a line, that has its name once it is whole."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")

    def __enter__(self) -> "_Listing":
        self.file = self.partial.open("w", encoding="utf-8")
        return self

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.partial.rename(self.path)
