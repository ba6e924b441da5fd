"""Addresses → bytes: local files by path, objects by `http(s)://`, `s3://` and `gs://`.

What comes in: an address and a range. What goes out: exactly these bytes, or an error that names the object. Surprise:
a transfer that breaks is not begun again. What has arrived is kept, the rest is asked for, and attempts count only
while nothing arrives; so a server that drops every connection after a megabyte is slow, and no failure.

fsspec's filesystems do the talking and find credentials where their own tools do; retries and time limits are here.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync

from phi3v_dist.errors import DataError
from phi3v_dist.printable import printable
from phi3v_dist.watch import heartbeat

SCHEMES = ("http", "https", "s3", "gs")
_BEGINNINGS = tuple(f"{scheme}://" for scheme in SCHEMES)
_ADDRESS = re.compile(r"^(\s*[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*@)?([^?#]*).*", re.DOTALL)
_ADDRESS_IN_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
PIECE_BYTES = 8 << 20  # of an object store: what one request asks for at most
SMALLEST_PIECE_BYTES = 256 << 10
REQUESTS_AT_ONCE = 16
RETRIED_STATUS = (408, 425, 429)  # and all from 500 on

CREDENTIALS = {
    "http": "sign the address anew if it has expired, or put the user and password into ~/.netrc",
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, which expires), on "
    "every node; AWS_ENDPOINT_URL for another store than Amazon's; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file on every node, or run `gcloud auth application-default "
    "login`; FSSPEC_GS_TOKEN=anon for a public bucket",
}

Sink = Callable[[bytes], object]
_knows_no_ranges: set[str] = set()  # addresses whose server answered a range with the whole object


@dataclass(frozen=True)
class Patience:
    """How long a server may be silent or slow.

    attempts: in a row without a single byte; the wait between them doubles from `first_wait_s` on.
    silence_s: of a connection, before it counts as broken.
    slowest_bytes_per_s: below this, averaged over a whole transfer, it fails.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    silence_s: float = 20.0  # below `watch.hang_s`, so that a try that failed is seen before the rank counts as stuck
    slowest_bytes_per_s: float = 65536.0


PATIENCE = Patience()


class StoreError(DataError):
    """An object cannot be had, and waiting longer would not help; the run stops."""


class NoRangesError(StoreError):
    """The server only gives whole objects."""


class _Refused(Exception):
    """An answer that no retry will change. status: as in HTTP."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"the server answers with status {status}")


def scheme_of(address: str) -> str | None:
    """The address's scheme; None for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(?i:(pipe|file)):", address)
    return match[1] or match[2].lower() if match else None


def is_remote(address: str) -> bool:
    return address.startswith(_BEGINNINGS)


def problem(address: str) -> str | None:
    """Why an address is refused; None when it is of a kind that can be read."""
    scheme = scheme_of(address)
    if scheme is None or scheme in SCHEMES:
        return None
    if scheme == "pipe":
        return f"{address}: `pipe:` would run a command, which data must never do; name the files themselves"
    if scheme == "file":
        return f"{address}: write a local path without `file:`"
    return f"{address}: `{scheme}://` cannot be read; use a local path, {', '.join(f'{s}://' for s in SCHEMES)}"


def shown(address: str) -> str:
    """The address for logs and files: without passwords and signatures, and without what does not show."""
    return printable(_ADDRESS.sub(r"\1\2", address))


def shown_words(words: str) -> str:
    """Words that may hold addresses, for logs and files; an address ends at the next blank."""
    return printable(_ADDRESS_IN_WORDS.sub(lambda found: shown(found[0]), words))


def name_of(address: str) -> str:
    """The file name."""
    return os.path.basename(urlsplit(address).path if is_remote(address) else address)


def glob(pattern: str) -> list[str]:
    """Addresses of the objects that a remote pattern with `*`, `?` or `[` names, sorted.

    Raises:
        DataError: the server cannot list, or refuses to.
    """
    scheme = scheme_of(pattern)
    assert scheme is not None  # the caller has looked
    if scheme.startswith("http"):
        raise DataError(f"{shown(pattern)}: `*` does not work over http, which lists nothing; write {{000..127}}")
    filesystem = _filesystem(scheme, PATIENCE.silence_s)
    filesystem.invalidate_cache()
    return sorted(f"{scheme}://{name}" for name in _patiently(pattern, lambda: filesystem._glob(pattern)))


def sizes(addresses: Iterable[str]) -> list[int | None]:
    """Bytes of each object, asked for in parallel; None for one that is not there. Raises StoreError."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, "sizes") as pool:
        return list(pool.map(_size_or_none, addresses))


def size(address: str) -> int:
    """Bytes of one object. Raises FileNotFoundError, StoreError."""
    filesystem = _filesystem(str(scheme_of(address)), PATIENCE.silence_s)

    async def ask() -> int:
        if not address.startswith("http"):
            return int((await filesystem._info(address, refresh=True))["size"])
        session = await filesystem.set_session()  # no HEAD: an address signed for GET refuses it
        async with session.get(filesystem.encode_url(address), headers=_ranged(0, 1)) as answer:
            _look_at(answer.status)
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            length = total if answer.status == 206 else answer.headers.get("Content-Length", "")
            if answer.status == 200:
                _knows_no_ranges.add(address)
            if answer.status == 416 or not length.isdecimal():
                return 0 if answer.status == 416 else _no_length(address)
            return int(length)

    return int(_patiently(address, ask))


def require_ranges(addresses: Iterable[str]) -> None:
    """Raises NoRangesError when the server of one of these, whose sizes were asked for, only gives whole objects."""
    for address in _knows_no_ranges.intersection(addresses):
        raise _no_ranges(address)


def read(address: str, begin: int, end: int) -> bytes:
    """Bytes begin … end-1 of an object; fewer where it ends. Raises FileNotFoundError, StoreError."""
    received = bytearray()
    _receive(address, begin, end, received.extend, whole=False)
    return bytes(received)


def download(address: str, path: Path, size_bytes: int, on_bytes: Callable[[int], object] = int) -> None:
    """An object → a file. What the file holds already is taken for the object's first bytes.

    on_bytes: told how many have come, each time; an OSError from it ends the download.

    Raises:
        FileNotFoundError, StoreError: of the object.
        OSError: the file cannot be written.
    """
    with path.open("ab") as file:
        begin = file.tell()
        if begin > size_bytes:
            file.truncate(begin := 0)
        _receive(address, begin, size_bytes, lambda data: on_bytes(file.write(data)), whole=True)
        if file.tell() != size_bytes:
            raise StoreError(f"{shown(address)}: ended after {file.tell():,} of {size_bytes:,} bytes; was it replaced?")


def _receive(address: str, begin: int, end: int, sink: Sink, whole: bool) -> None:
    """Hand bytes begin … end-1 to `sink`, in order, over as many requests as it takes.

    whole: take the beginning of the object again, and drop it, from a server that knows no ranges.
    """
    scheme = str(scheme_of(address))
    filesystem = _filesystem(scheme, PATIENCE.silence_s)
    received, piece_bytes = 0, PIECE_BYTES
    failure: list[OSError] = []

    def take(data: bytes) -> None:
        nonlocal received
        try:
            sink(data)
        except OSError as error:  # the disk's, not the network's: not to be tried again
            failure.append(error)
            raise
        received += len(data)

    async def go_on() -> None:
        if scheme.startswith("http"):
            await _stream(filesystem, address, begin + received, end, take, whole)
            return
        while begin + received < end:
            stop = min(end, begin + received + piece_bytes)
            data = await filesystem._cat_file(address, start=begin + received, end=stop)
            take(data)
            if begin + received < stop:
                return  # the object ends here

    def progress() -> int:
        nonlocal piece_bytes
        piece_bytes = max(SMALLEST_PIECE_BYTES, piece_bytes // 2)  # only asked after a failure
        if failure:
            raise failure[0]
        return received

    if begin < end:
        _patiently(address, go_on, end - begin, progress)


def _no_ranges(address: str) -> NoRangesError:
    return NoRangesError(
        f"{shown(address)}: the server gives no byte ranges, so single samples cannot be read; set `data.cache.path`, "
        "so that whole shards are fetched, or copy the shards"
    )


async def _stream(filesystem: Any, address: str, begin: int, end: int, take: Sink, whole: bool) -> None:
    """One GET: hand on what comes, as it comes."""
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(address), headers=_ranged(begin, end)) as answer:
        if answer.status == 416:
            return  # the object ends before `begin`
        _look_at(answer.status)
        skip = 0
        if answer.status == 206:
            if not answer.headers.get("Content-Range", f"bytes {begin}-").startswith(f"bytes {begin}-"):
                raise ConnectionError(f"another range than asked for: {answer.headers['Content-Range']}")
        elif whole or begin == 0:
            skip = begin
        else:
            raise _no_ranges(address)
        left = end - begin
        async for data in answer.content.iter_any():
            if skip:
                data, skip = data[skip:], max(0, skip - len(data))
            if data:
                heartbeat.read_on()
                take(data[:left])
                left -= len(data[:left])
            if not left:
                return


def _patiently(address: str, ask: Callable[[], Any], size_bytes: int = 0, progress: Callable[[], int] = int) -> Any:
    """The result of a coroutine function, tried again while there is hope.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: credentials are missing or refused, or the patience is over.
    """
    patience, scheme = PATIENCE, str(scheme_of(address))
    loop = _filesystem(scheme, patience.silence_s).loop
    limit_s = 2 * patience.silence_s + size_bytes / patience.slowest_bytes_per_s
    deadline = time.monotonic() + limit_s
    tries, had = 0, 0

    async def limited() -> Any:
        return await asyncio.wait_for(ask(), max(0.001, deadline - time.monotonic()))

    while True:
        try:
            return sync(loop, limited)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise error if error.errno else FileNotFoundError(f"{shown(address)}: no such object") from None
        except Exception as error:  # each library has its own; what is not known to be hopeless is tried again
            if _status(error) == 404:
                raise FileNotFoundError(f"{shown(address)}: no such object") from None
            if hopeless := _hopeless(error, scheme):
                raise StoreError(f"{shown(address)}: {hopeless}") from None  # the cause may hold an address's secret
            reason = type(error).__name__ if isinstance(error, TimeoutError) else _first_line(error)
        heartbeat.read_on(f"{shown(address)}, tried again")  # patience has its own limit, and says more
        now = progress()
        tries, had = (1 if now > had else tries + 1), now
        wait_s = patience.first_wait_s * 2 ** (tries - 1) * random.uniform(0.5, 1)  # so that ranks do not come at once
        if tries >= patience.attempts or time.monotonic() + wait_s > deadline:
            got = f" after {had:,} of {size_bytes:,} bytes" if size_bytes else ""
            why = f"{tries} attempts in a row failed" if tries >= patience.attempts else f"too slow, {limit_s:.0f} s"
            raise StoreError(f"{shown(address)}: {why}{got} ({reason}); is the store up, and the network?")
        time.sleep(wait_s)


def _hopeless(error: Exception, scheme: str) -> str | None:
    """What to do about an error that waiting does not mend; None for the others."""
    status = _status(error)
    scheme = "http" if scheme == "https" else scheme
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        refused = f"access refused{f' (status {status})' if status else ''}"
        return f"{refused}: {CREDENTIALS[scheme]}"
    if status and 400 <= status < 500 and status not in RETRIED_STATUS:
        return f"the server refuses it (status {status}); correct the address"
    return None


def _status(error: Exception) -> int | None:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _first_line(error: Exception) -> str:
    return re.sub(r"\w+://\S+", "…", str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]


def _look_at(status: int) -> None:
    if status == 404:
        raise FileNotFoundError
    if status >= 400 and status != 416:
        raise _Refused(status)


def _ranged(begin: int, end: int) -> dict[str, str]:
    return {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}


def _no_length(address: str) -> int:
    raise StoreError(f"{shown(address)}: the server does not say how long it is; copy the shards to another place")


def _size_or_none(address: str) -> int | None:
    try:
        return size(address)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=8)
def _filesystem(scheme: str, silence_s: float) -> Any:
    """fsspec's filesystem for a scheme, whose own retries are off. Raises StoreError when it is not installed."""
    options: dict[str, Any] = {}
    if scheme.startswith("http"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False}}
    elif scheme == "s3":
        limits = {"connect_timeout": silence_s, "read_timeout": silence_s, "retries": {"max_attempts": 0}}
        options = {"config_kwargs": limits}
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise StoreError(
            f"{scheme}:// needs a package that is not installed: pip install 'phi3v-dist[{scheme}]'"
        ) from error
    filesystem.retries = 1
    return filesystem
