"""What each optimizer step consumed → `ledger.bin`, one chained record per step, from which `audit` proves the rest.

What comes in: a step's rows and what became of each sample. What goes out: an append-only file, and its `Head`, which
every checkpoint stores. Surprise: a record above the newest checkpoint's head means nothing. Its step is trained again
after a kill, so a resume cuts the file at the head, torn records and all; "exactly once" is about what is left.

Format version 1, to the byte in docs/data-formats.md: a line of JSON, then per step a payload between its length and
sha256(hash before it + payload). The first hash is that of the JSON line.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from phi3v_dist.errors import DataError
from phi3v_dist.survive.durable import write_durably

LEDGER_NAME = "ledger.bin"
FORMAT = "phi3v-dist ledger"
FORMAT_VERSION = 1
UPGRADE = "Version 1 is the first. A reader that finds a version it does not know must refuse."
LENGTH = struct.Struct("<I")
COUNTS = struct.Struct("<QIIIIII")  # step, attempt, world size, rows, empty rows, samples, samples not trained
ID, PLACE, STATUS = np.dtype("<u4"), np.dtype("<u4"), np.dtype("u1")
MAX_SAMPLES = 2**32  # in a shard table, for ids of 4 bytes
HASH_BYTES = 32
MAX_PAYLOAD_BYTES = 2**28  # a step of 60 million samples; a greater length is damage and is not allocated
MAX_HEADER_BYTES = 2**20

WAY_OUT = (
    "put the run's own file back. Without it nobody can say what these weights have seen; to train on from them all "
    "the same, begin another run with `model.init_from`"
)


class Status(IntEnum):
    """What became of a planned sample. SKIPPED: its step made no update."""

    TRAINED = 0
    QUARANTINED = 1
    SKIPPED = 2


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    rows: sample ids, row by row, in the plan's order.
    empty_rows: rows without a sample, which filled up the step's micro-steps.
    not_trained: place of a sample in the step, counted through its rows → why it was not trained.
    """

    step: int
    attempt: int
    world_size: int
    rows: tuple[tuple[int, ...], ...]
    empty_rows: int = 0
    not_trained: Mapping[int, Status] = field(default_factory=dict)

    @property
    def sample_ids(self) -> list[int]:
        return [sample_id for row in self.rows for sample_id in row]


class Head(NamedTuple):
    """Where a ledger stands: after which step, at which byte, with which hash (hexadecimal)."""

    step: int
    size_bytes: int
    hash: str


class Ledger:
    """The file while a run writes it. Rank 0 alone has one."""

    def __init__(self, path: Path, file: FileIO, head: Head):
        self.path, self._file, self.head = path, file, head

    @classmethod
    def begin(cls, path: Path, facts: Mapping[str, Any]) -> "Ledger":
        """A new file in place of any other. facts: what decides the plan; it goes into the first line."""
        header = {"format": FORMAT, "version": FORMAT_VERSION, "upgrade": UPGRADE, **facts}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(header) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error
        return cls._open(path, LedgerReader(path).start)

    @classmethod
    def resume(cls, path: Path, head: Head) -> "Ledger":
        """Go on from a checkpoint's head, and forget what stands above it.

        Raises:
            DataError: the file does not reach up to the head with every byte as it was written.
        """
        LedgerReader(path).require(head)
        return cls._open(path, head)

    @classmethod
    def _open(cls, path: Path, head: Head) -> "Ledger":
        try:
            file = FileIO(path, "r+")
            file.truncate(head.size_bytes)
            file.seek(head.size_bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error
        return cls(path, file, head)

    def append(self, record: Record) -> None:
        """Write one record by one call: a kill cannot take it back, a power cut can until `sync`.

        Raises:
            DataError: the disk is full, or another process writes the file too.
        """
        assert record.step == self.head.step + 1, f"step {record.step} cannot follow step {self.head.step}"
        payload = encode(record)
        digest = hashlib.sha256(bytes.fromhex(self.head.hash) + payload)
        content = LENGTH.pack(len(payload)) + payload + digest.digest()
        try:
            found = os.fstat(self._file.fileno()).st_size
            if found != self.head.size_bytes:
                raise DataError(
                    f"{self.path} has {found} bytes, but this run left it with {self.head.size_bytes}: another process "
                    "writes it. Was the run started twice? Stop both, then start one of them"
                )
            written = self._file.write(content)
            if written != len(content):
                raise OSError(f"only {written} of {len(content)} bytes fitted")
        except OSError as error:
            raise DataError(f"{self.path}: step {record.step} cannot be recorded: {error}. Make room there") from error
        self.head = Head(record.step, self.head.size_bytes + len(content), digest.hexdigest())

    def sync(self) -> Head:
        """When this returns all records are on the disk, and a checkpoint may name the head."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be flushed to the disk: {error}") from error
        return self.head

    def close(self) -> None:
        self._file.close()


class LedgerReader:
    """A ledger as it lies on the disk, read from front to back.

    facts: the first line. start: the head before the first record.
    torn_bytes: known at the end of an iteration; what a kill left of a record at the file's end.
    """

    def __init__(self, path: Path):
        """Raises DataError when there is no file, or its first line is not a ledger's."""
        self.path = path
        self.torn_bytes = 0
        try:
            with path.open("rb") as file:
                line = file.readline(MAX_HEADER_BYTES)
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no ledger; {WAY_OUT}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        try:
            self.facts: dict[str, Any] = json.loads(line)
            if not line.endswith(b"\n") or self.facts["format"] != FORMAT:
                raise ValueError("another format")
            version = self.facts["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: damaged in its first line, or not a ledger ({error}); {WAY_OUT}") from error
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has ledger version {version!r}, this program reads version {FORMAT_VERSION}: use the release "
                f"that wrote it. {UPGRADE}"
            )
        self.start = Head(0, len(line), hashlib.sha256(line).hexdigest())

    def __iter__(self) -> Iterator[tuple[Record, Head]]:
        """Each record, and the head after it. Raises DataError naming the first one that is not as it was written."""
        for payload, head in self._payloads():
            record = decode(payload)
            if record is None or record.step != head.step:
                raise DataError(f"{self.path}: record {head.step}, before byte {head.size_bytes}, says nothing a run "
                                f"would write; {WAY_OUT}")  # fmt: skip
            yield record, head

    def require(self, head: Head) -> None:
        """Raises DataError unless every byte up to `head` is as it was written."""
        reached = self.start
        if head != reached:
            for _, reached in self._payloads():
                if reached.size_bytes >= head.size_bytes:
                    break
        if reached == head:
            return
        if reached.size_bytes < head.size_bytes:
            raise DataError(
                f"{self.path} ends after step {reached.step}, at byte {reached.size_bytes}; the checkpoint was saved "
                f"with step {head.step} at byte {head.size_bytes}. Its end is lost: {WAY_OUT}"
            )
        raise DataError(
            f"{self.path} is not the ledger this checkpoint was saved with: at step {reached.step} and byte "
            f"{reached.size_bytes} the hash is {reached.hash[:12]}…, the checkpoint has step {head.step}, byte "
            f"{head.size_bytes}, {head.hash[:12]}…. It is of another run, or was written anew; {WAY_OUT}"
        )

    def _payloads(self) -> Iterator[tuple[bytes, Head]]:
        """Each payload whose hash is right. One cut off by the end of the file is left out and counted as torn."""
        head = self.start
        self.torn_bytes = 0
        with self.path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            file.seek(head.size_bytes)
            while head.size_bytes < end:
                found = _read_payload(file, end - head.size_bytes)
                if found is None:
                    self.torn_bytes = end - head.size_bytes
                    return
                payload, stored = found
                digest = hashlib.sha256(bytes.fromhex(head.hash) + payload)
                if digest.digest() != stored:
                    raise DataError(
                        f"{self.path}: record {head.step + 1}, from byte {head.size_bytes} on, was changed after it "
                        f"was written (its hash does not follow from the one before); {WAY_OUT}"
                    )
                size_bytes = head.size_bytes + LENGTH.size + len(payload) + HASH_BYTES
                head = Head(head.step + 1, size_bytes, digest.hexdigest())
                yield payload, head


def _read_payload(file: BinaryIO, rest_bytes: int) -> tuple[bytes, bytes] | None:
    """(payload, hash); None when they are not all there. A length that is damage gives a hash that is none."""
    prefix = file.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(prefix)
    if not COUNTS.size <= length <= MAX_PAYLOAD_BYTES:
        return b"", b""
    if LENGTH.size + length + HASH_BYTES > rest_bytes:
        return None
    return file.read(length), file.read(HASH_BYTES)


def encode(record: Record) -> bytes:
    """The payload of a record."""
    ids = record.sample_ids
    places = sorted(record.not_trained)
    counts = (len(record.rows), record.empty_rows, len(ids), len(places))
    return b"".join(
        (
            COUNTS.pack(record.step, record.attempt, record.world_size, *counts),
            np.array([len(row) for row in record.rows], PLACE).tobytes(),
            np.array(ids, ID).tobytes(),
            np.array(places, PLACE).tobytes(),
            np.array([record.not_trained[place] for place in places], STATUS).tobytes(),
        )
    )


def decode(payload: bytes) -> Record | None:
    """The record of a payload; None when it is none."""
    step, attempt, world_size, num_rows, empty_rows, num_ids, num_not_trained = COUNTS.unpack_from(payload)
    sizes = [COUNTS.size, num_rows * PLACE.itemsize, num_ids * ID.itemsize, num_not_trained * PLACE.itemsize]
    if sum(sizes) + num_not_trained * STATUS.itemsize != len(payload):
        return None
    at_rows, at_ids, at_places, at_statuses = np.cumsum(sizes).tolist()
    row_sizes = np.frombuffer(payload, PLACE, num_rows, at_rows).tolist()
    ids = np.frombuffer(payload, ID, num_ids, at_ids).tolist()
    places = np.frombuffer(payload, PLACE, num_not_trained, at_places).tolist()
    statuses = payload[at_statuses:]
    known = all(status <= max(Status) for status in statuses)
    if sum(row_sizes) != num_ids or not known or any(place >= num_ids for place in places):
        return None
    rows, begin = [], 0
    for size in row_sizes:
        rows.append(tuple(ids[begin : begin + size]))
        begin += size
    not_trained = dict(zip(places, map(Status, statuses), strict=True))
    return Record(step, attempt, world_size, tuple(rows), empty_rows, not_trained)
