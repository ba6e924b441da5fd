"""Any user's data → WebDataset shards that train, and a manifest that says what is in them.

    source → drafts → pictures → samples → survey;  survey → splits and shards;  the same again → tars → index

What comes in: the name of a source and `ImportSettings`. What goes out: OUT/train-000000.tar, …, validation and test
likewise, `failures.jsonl`, `duplicates.jsonl`, `train.yaml` and `import.json`. Surprise: the source is read twice, so
that splits and shard sizes are known before the first byte is written. What an interrupted import needs to go on, and
downloaded pictures, lie in OUT/.import, which may be deleted at the end.
"""

import difflib
import fcntl
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.importers.assignment import Assignment, assign
from phi3v_dist.data.importers.conversation import Draft, draft
from phi3v_dist.data.importers.download import Downloads, Fetched
from phi3v_dist.data.importers.gather import Candidate, ordered_map, read_pictures, with_downloads
from phi3v_dist.data.importers.manifest import describe, list_failures
from phi3v_dist.data.importers.packing import NUM_CROPS, Packed, pack
from phi3v_dist.data.importers.records import BadRecord, Source
from phi3v_dist.data.importers.settings import ImportSettings
from phi3v_dist.data.importers.source import open_source
from phi3v_dist.data.importers.starter import starter_config
from phi3v_dist.data.importers.survey import Survey, Verdict, store
from phi3v_dist.data.importers.writing import missing_shards, write_shards
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.data.templates import template_fields
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.progress import Report
from phi3v_dist.survive.durable import write_durably

VERSION = 1  # of import.json, and of what is written for the same records and settings
PEEKED_RECORDS = 100


@dataclass(frozen=True)
class Import:
    """One import: where from, where to, how. `work` is the folder for what can be deleted afterwards."""

    name: str
    out: Path
    settings: ImportSettings
    model: Path | None
    progress: Report

    @property
    def work(self) -> Path:
        return self.out / ".import"

    def run(self) -> dict[str, Any]:
        """Import, or finish what was begun; returns what is in import.json.

        Raises:
            ConfigError: the mapping does not fit the source's columns.
            DataError: the source cannot be read, the folder is another's, or no record is good.
        """
        self._refuse_other_files()
        processor = Phi3VProcessor.from_pretrained(self.model, NUM_CROPS[0]) if self.model else None
        source = self._open_source()
        claim = self._claim(source, processor)
        if finished := self._finished(claim):
            return finished
        check_columns(source, self.settings)
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{self.out}: another process is importing into this folder") from error
            return self._write(source, claim, processor)

    def _write(self, source: Source, claim: dict[str, Any], processor: Phi3VProcessor | None) -> dict[str, Any]:
        write_durably(self.work / "claim.json", json.dumps(claim, indent=2) + "\n")
        survey = Survey(self.work)
        with ThreadPoolExecutor(self.settings.num_workers) as pool:
            store(self._verdicts(source, survey.num_done(), processor, pool), survey, self._looking(source))
            assignment = assign(survey, self.settings)
            failures = list_failures(self.out, survey, assignment)
            if not assignment.names:
                survey.delete()  # a corrected mapping may use the same folder
                raise DataError(f"{self.name}: {_nothing_good(failures, len(assignment.shard), self.out)}")
            write_shards(self.out, assignment, self._samples(source, survey, assignment, pool))
        self._index(assignment)
        manifest = {**claim, "failures": failures, **describe(self.out, source, survey, assignment)}
        if not (self.out / "train.yaml").exists():  # it may have been edited
            write_durably(self.out / "train.yaml", starter_config(self.out, manifest, self.model))
        write_durably(self.out / "import.json", json.dumps(manifest, indent=2) + "\n")
        return manifest

    def _open_source(self) -> Source:
        asked = [self.name, self.settings.dataset_config, self.settings.dataset_split, self.settings.dataset_revision]
        parts = self.work / "hub" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        return open_source(self.name, self.settings, parts, lambda done: self.progress("copying", done, None))

    def _refuse_other_files(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise DataError(f"{self.out}: is a file; name a folder to write shards into")
        known = self.work.is_dir() or (self.out / "import.json").is_file()
        if not known and self.out.is_dir() and any(self.out.iterdir()):
            raise DataError(f"{self.out}: is not empty, and what it holds is no import; choose another folder")

    def _claim(self, source: Source, processor: Phi3VProcessor | None) -> dict[str, Any]:
        """What this import is, compared with what the folder holds."""
        claim = {
            "version": VERSION, "source": self.name, "source_digest": source.digest,
            "tokenizer_digest": processor.digest if processor else None, "settings": self.settings.decides(),
        }  # fmt: skip
        begun = any(self.work.glob("survey-*")) or any(self.out.glob("*.tar"))
        for path in (self.out / "import.json", self.work / "claim.json"):
            if begun and path.is_file():
                found = json.loads(path.read_text())
                other = [key for key in claim if key != "settings" and found.get(key) != claim[key]]
                stored = found.get("settings", {})
                other += [key for key, value in claim["settings"].items() if stored.get(key) != value]  # type: ignore[attr-defined]
                if other:
                    raise DataError(
                        f"{self.out}: holds another import (what differs: {', '.join(other)}); choose another folder, "
                        "or delete this one"
                    )
        return claim

    def _finished(self, claim: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest, when everything it names is there."""
        path = self.out / "import.json"
        if not path.is_file():
            return None
        manifest = json.loads(path.read_text())
        shards = [(self.out / shard["name"], shard["size_bytes"]) for shard in manifest["shards"]]
        whole = all(tar.is_file() and tar.stat().st_size == size_bytes for tar, size_bytes in shards)
        return manifest if whole else None

    def _looking(self, source: Source) -> Callable[[int], None]:
        return lambda done: self.progress("checking", done, source.num_records)

    def _candidates(self, source: Source, is_wanted: Callable[[int], bool]) -> Iterator[Candidate]:
        for number, (file, row) in enumerate(source.read()):
            if is_wanted(number):
                try:
                    yield Candidate(number, file, row if isinstance(row, BadRecord) else draft(row, self.settings))
                except BadRecord as bad:
                    yield Candidate(number, file, bad)
                except RecursionError:
                    yield Candidate(number, file, BadRecord("conversation", "it is nested too deeply"))

    def _packed(
        self, source: Source, is_wanted: Callable[[int], bool], processor: Phi3VProcessor | None, verify: bool,
        pool: ThreadPoolExecutor,
    ) -> Iterator[tuple[Candidate, Packed | BadRecord]]:  # fmt: skip
        """Wanted records as samples, or why they are none, in record order."""
        folder = self.settings.image_root or source.folder
        downloads = Downloads(self.settings.cache or self.work / "downloads", self.settings.download)

        def work(found: tuple[Candidate, tuple[Fetched, ...]]) -> tuple[Candidate, Packed | BadRecord]:
            candidate, fetched = found
            if isinstance(candidate.draft, BadRecord):
                return candidate, candidate.draft
            try:
                pictures = read_pictures(candidate.draft.pictures, fetched, folder)
                return candidate, pack(candidate.draft, pictures, verify, processor)
            except BadRecord as bad:
                return candidate, bad
            except RecursionError:
                return candidate, BadRecord("conversation", "it is nested too deeply")

        found = with_downloads(self._candidates(source, is_wanted), downloads)
        return ordered_map(pool, work, found, look_ahead=2 * self.settings.num_workers)

    def _verdicts(
        self, source: Source, start: int, processor: Phi3VProcessor | None, pool: ThreadPoolExecutor
    ) -> Iterator[Verdict]:
        is_wanted = lambda number: number >= start  # noqa: E731
        for candidate, packed in self._packed(source, is_wanted, processor, self.settings.verify, pool):
            key = candidate.draft.split_key if isinstance(candidate.draft, Draft) else None
            split_hash = xxhash.xxh3_64_intdigest(key.encode(errors="surrogatepass")) if key is not None else 0
            yield Verdict.of(candidate.number, candidate.file, split_hash, packed)

    def _samples(
        self, source: Source, survey: Survey, assignment: Assignment, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Members of the samples whose shards are missing. Raises DataError: one is not what it was when surveyed."""
        missing = missing_shards(self.out, assignment)
        is_wanted = np.isin(assignment.shard, sorted(missing))
        expected = survey.column("content_hash")
        wanted = lambda number: number < len(is_wanted) and bool(is_wanted[number])  # noqa: E731
        found = self._packed(source, wanted, None, False, pool)
        for done, (candidate, packed) in enumerate(found, start=1):
            if isinstance(packed, BadRecord) or packed.content_hash != expected[candidate.number]:
                why = packed.reason if isinstance(packed, BadRecord) else "its pictures or words are others"
                raise DataError(
                    f"{self.name}: record {candidate.number + 1} changed while it was imported ({why}); delete "
                    f"{self.out} and import again"
                )
            yield candidate.number, packed.members
            self.progress("writing", done, int(is_wanted.sum()), "samples")

    def _index(self, assignment: Assignment) -> None:
        sources = [SourceSettings(shards=[str(self.out / name) for name in assignment.names])]
        table = ShardTable.open(
            sources, on_progress=lambda done, total: self.progress("indexing", done, total, "shards")
        )
        expected = int((assignment.shard >= 0).sum())
        assert len(table) == expected, f"{len(table)} samples indexed, {expected} written"


def check_columns(source: Source, settings: ImportSettings) -> None:
    """Compare the mapping with the columns of the first records. Raises ConfigError: it names one that is in none."""
    first = [row for _, row in itertools.islice(source.read(), PEEKED_RECORDS)]
    if not first:
        raise DataError(f"{source.files[0]}: holds no records")
    known = {column for row in first if isinstance(row, dict) for column in row}
    wanted = {column: f"`{column}`" for column in settings.columns()}
    wanted |= {name: f"template {text!r}" for text in settings.templates() for name in template_fields(text)}
    problems = []
    for column, where in wanted.items():
        if known and column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            if near and not near[0].isidentifier() and where.startswith("template"):
                hint += f" In a template that is {{{{ record[{near[0]!r}] }}}}"
            problems.append(
                f"{where}: no column {column!r} in the first {len(first)} records of {source.files[0]}{hint} "
                f"(columns: {', '.join(sorted(known))})"
            )
    if problems:
        raise ConfigError(problems)


def _nothing_good(failures: dict[str, int], num_records: int, out: Path) -> str:
    reasons = ", ".join(f"{kind}: {count:,}" for kind, count in failures.items())
    return f"none of its {num_records:,} records can be used ({reasons}); {out / 'failures.jsonl'} has each reason"
