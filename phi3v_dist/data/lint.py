"""Shards → everything that is wrong or odd with them, each with the shard, the key and what to do about it.

What comes in: a `ShardTable`, and how closely to look. What goes out: `Finding`s of a few kinds. Surprise: without
`deep` or `decode` no picture is read. The index knows sizes and checksums of all members, so most of what can be wrong
is found from it and the texts alone; of each sample 16 bytes are kept, to find those that come twice.

Problems cost samples or hide damage. Notices are worth a look and may be meant.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from phi3v_dist.data import store
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.index import Member
from phi3v_dist.data.pictures import IMAGE_SUFFIXES, PICTURE_ERRORS, decode_image
from phi3v_dist.data.samples import TEXT_MEMBERS, BadSample, Message, read_messages
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.printable import printable

CHUNK_SAMPLES = 256  # looked at by one thread at a time
HUGE_BYTES = 32 << 20
THIN_RATIO = 50
HOPELESS_RATIO = 16 * 336  # at 16 crops the short side would be scaled to less than one pixel (crops.py)
MAX_ALONE_FRAC = 0.1
UNEVEN_RATIO = 4  # largest shard to the median one

_LOOK_ALIKE = re.compile(r"<\|\w{1,40}\|>|</?s>|<unk>|<image>")

PROBLEMS = {
    "damage": ("damaged place in a tar", "copy or write the shard again; what it hit is left out, all else is used"),
    "unusable": ("unusable by its index", "mend the sample where shards are made; training leaves it out"),
    "bytes": ("bytes are not those indexed", "copy the shard again; if it was written anew, delete its index"),
    "text": ("text cannot be used", "correct the JSON, or the source's `prompt` and `answer`"),
    "answer": ("nothing to learn", "give the conversation an assistant turn with words"),
    "picture": ("picture cannot be decoded", "fetch or encode the picture again"),
    "hopeless": ("picture too long and thin to be cut into crops", "trim it, or cut it into several pictures"),
}
NOTICES = {
    "contents": ("same contents as another sample", "leave one of them out, unless it should count twice"),
    "key": ("same key in another shard", "nothing breaks; names in logs need the shard to be unique"),
    "note": ("odd, but used", "write the shard anew if it was not meant"),
    "odd key": ("key with characters that do not show", "logs spell them out; rename if the key is used elsewhere"),
    "dot": ("picture of one pixel", "it is enlarged to a whole picture of one colour; probably a tracking pixel"),
    "thin": ("very long and thin picture", "little of it is seen after scaling; cut it into several"),
    "alone": (
        "no picture, where nearly all samples of the shard have one",
        "text alone is trained, and a question about a picture then teaches guessing: see whether it was lost",
    ),
    "look-alike": ("text that looks like a special token", "it stays plain text; strip it if a converter left it"),
    "huge": ("huge member", "pictures are scaled to a few megapixels at most: shrink it to read faster"),
    "ignored": ("members that nothing reads", "known are .json, .txt and pictures; leave out the others"),
    "uneven": ("shards of very unequal size", "fine here; other readers balance by shard: write them alike"),
}


class Finding(NamedTuple):
    """One thing to look at. key: "" when it is about a whole shard."""

    kind: str
    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{f':{self.key}' if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class LintOptions:
    """deep: read every member and compare it with its checksum. decode: also decode every picture."""

    deep: bool = False
    decode: bool = False
    num_threads: int = 4


@dataclass
class Report:
    """findings: by kind, in the order of the shards."""

    num_samples: int = 0
    num_shards: int = 0
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        self.findings.setdefault(finding.kind, []).append(finding)

    def of(self, kinds: Mapping[str, tuple[str, str]]) -> list[tuple[str, str, list[Finding]]]:
        """(title, what to do, findings) of those kinds that were found, in the order of `kinds`."""
        return [(*kinds[kind], self.findings[kind]) for kind in kinds if kind in self.findings]

    @property
    def num_problems(self) -> int:
        return sum(len(self.findings.get(kind, ())) for kind in PROBLEMS)


def lint(table: ShardTable, options: LintOptions, on_progress: Callable[[int, int], None] | None = None) -> Report:
    """Look at every sample. on_progress: told (samples looked at, samples)."""
    report = Report(len(table), len(table.shards))
    fetcher = Fetcher(table)
    spans = list(_spans(table))
    keys, contents = np.zeros(len(table), np.uint64), np.zeros(len(table), np.uint64)

    def look(span: tuple[int, int]) -> list[Finding]:
        shard, _ = table.locate(span[0])
        with fetcher.whole(shard) if options.deep or options.decode else nullcontext():
            return [finding for sample_id in range(*span) for finding in look_at(sample_id)]

    def look_at(sample_id: int) -> Iterator[Finding]:
        yield from _look_at(sample_id, table, fetcher, options)
        shard, number = table.locate(sample_id)
        index = table.index(shard)
        members = [(member.name, member.size_bytes, member.checksum) for member in index.members(number)]
        keys[sample_id] = xxhash.xxh3_64_intdigest(index.key(number).encode())
        contents[sample_id] = xxhash.xxh3_64_intdigest(repr(members).encode())

    with ThreadPoolExecutor(options.num_threads, "lint") as pool:
        for span, found in zip(spans, pool.map(look, spans), strict=True):
            for finding in found:
                report.add(finding)
            if on_progress:
                on_progress(span[1], len(table))
    for shard in range(len(table.shards)):
        for finding in _of_shard(shard, table):
            report.add(finding)
    for finding in [*_repeated("contents", contents, table), *_repeated("key", keys, table), *_uneven(table)]:
        report.add(finding)
    return report


def _spans(table: ShardTable) -> Iterator[tuple[int, int]]:
    """Ranges of sample ids, none beyond a shard; a remote shard is one, so that one thread has its copy."""
    for shard, (start, end) in enumerate(zip(table.start[:-1].tolist(), table.start[1:].tolist(), strict=True)):
        step = max(1, end - start) if store.is_remote(table.shards[shard]) else CHUNK_SAMPLES
        yield from ((begin, min(begin + step, end)) for begin in range(start, end, step))


def _look_at(sample_id: int, table: ShardTable, fetcher: Fetcher, options: LintOptions) -> Iterator[Finding]:
    shard, number = table.locate(sample_id)
    index, name = table.index(shard), table.shard_name(shard)
    key, members = index.key(number), index.members(number)

    def found(kind: str, what: str) -> Finding:
        return Finding(kind, name, key, printable(what))

    for kind, what in _of_members(members):
        yield found(kind, what)
    begin, end = index.columns["key_start"][number : number + 2]
    if not index.columns["key_bytes"][begin:end].tobytes().decode(errors="surrogateescape").isprintable():
        yield found("odd key", "it has control characters or bytes that are no UTF-8")
    if number in index.notes:
        yield found("note", index.notes[number])
    if number in index.bad:
        yield found("unusable", index.bad[number])
        return
    try:
        parts = fetcher.fetch(sample_id, text_only=not (options.deep or options.decode))
    except BadSample as error:
        yield found("bytes", error.reason)
        return
    pictures = list(index.image_sizes(number))
    try:
        messages = read_messages(parts, pictures, table.sources[int(table.source_of_shard[shard])])
    except ValueError as error:
        yield found("answer" if "nothing to learn" in str(error) else "text", str(error))
    else:
        for kind, what in _of_messages(messages):
            yield found(kind, what)
    for picture in pictures if options.decode else ():
        try:
            decode_image(parts[picture])
        except PICTURE_ERRORS as error:
            yield found("picture", f"{picture}: {error}")


def _of_members(members: list[Member]) -> Iterator[tuple[str, str]]:
    for member in members:
        if member.size_bytes > HUGE_BYTES:
            yield "huge", f"{member.name} has {member.size_bytes / 1e6:,.0f} MB"
        if member.width:
            short, long = sorted((member.width, member.height))
            size = f"{member.name} has {member.width} x {member.height} px"
            if long == 1:
                yield "dot", size
            elif long > HOPELESS_RATIO * short:
                yield "hopeless", size
            elif long > THIN_RATIO * short:
                yield "thin", size


def _of_messages(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    texts = [part for message in messages for part in message.parts if isinstance(part, str)]
    if not any(message.role == "assistant" for message in messages):
        yield "answer", "the conversation has no assistant turn"
    if any(not _is_unicode(text) for text in texts):
        yield "text", "half of a surrogate pair, which is no valid Unicode"
    if look_alikes := sorted({word for text in texts for word in _LOOK_ALIKE.findall(text)}):
        yield "look-alike", ", ".join(look_alikes[:5])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _repeated(kind: str, digests: np.ndarray, table: ShardTable) -> Iterator[Finding]:
    """All but the first of the samples whose digests are equal, each with the first one's name."""
    values, counts = np.unique(digests, return_counts=True)
    first: dict[int, int] = {}
    for sample_id in np.flatnonzero(np.isin(digests, values[counts > 1])).tolist():
        earlier = first.setdefault(int(digests[sample_id]), sample_id)
        if earlier != sample_id:
            shard, number = table.locate(sample_id)
            what = f"as {table.sample_name(earlier)}"
            yield Finding(kind, table.shard_name(shard), table.index(shard).key(number), what)


def _of_shard(shard: int, table: ShardTable) -> Iterator[Finding]:
    index, name = table.index(shard), table.shard_name(shard)
    for damage in index.damage:
        yield Finding("damage", name, "", f"bytes {damage.begin:,} to {damage.end:,}: {printable(damage.reason)}")
    bounds = index.columns["member_start"]
    num_pictures = np.diff(np.concatenate([[0], np.cumsum(index.columns["width"] > 0)])[bounds])
    alone = [number for number in np.flatnonzero(num_pictures == 0).tolist() if number not in index.bad]
    if 0 < len(alone) <= MAX_ALONE_FRAC * len(index):
        yield from (Finding("alone", name, index.key(number), "no picture") for number in alone)
    counts = np.bincount(index.columns["member_name"], minlength=len(index.names))
    for member, count in zip(index.names, counts.tolist(), strict=True):
        if member not in TEXT_MEMBERS and member.rsplit(".", 1)[-1] not in IMAGE_SUFFIXES:
            yield Finding("ignored", name, "", f"{count:,} x .{printable(member)}")


def _uneven(table: ShardTable) -> Iterator[Finding]:
    sizes = table.rows.tar_size_bytes
    median, largest = float(np.median(sizes)), int(sizes.argmax())
    if sizes[largest] > UNEVEN_RATIO * median:
        what = f"{sizes[largest] / 1e6:,.1f} MB, the median shard has {median / 1e6:,.1f} MB"
        yield Finding("uneven", table.shard_name(largest), "", what)
