"""One URL → a file with its bytes, or why it cannot be had.

What comes in: an address from a stranger's list, and where to put the file. What goes out: the number of attempts and,
if it did not work, a `Failure` that says whether it ever may. Surprise: nothing that a server says about itself is
believed. Lengths, packing, redirects and the time it takes all have limits, and an image may be an HTML page.
"""

import email.utils
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Self

import anyio
import httpx
from anyio.to_thread import run_sync
from pydantic import Field

from phi3v_dist.data.store import shown_words

SCHEMES = ("http", "https")
MAX_LABEL = 63  # letters between two dots of a host name
BLOCK_BYTES = 1 << 16
KEPT_CONNECTIONS = 4  # of a slot: the last hosts, and where they redirect to
TRY_AGAIN = (408, 425, 429)  # and all from 500 on; the other answers stay what they are
Verify = Callable[[bytes], str | None]


@dataclass(frozen=True)
class DownloadSettings:
    """How hard to try."""

    concurrency: Annotated[int, Field(ge=1)] = 64
    """Transfers at a time."""
    look_ahead: Annotated[int, Field(ge=1)] = 4096
    """URLs taken up before the first of them is given out; a slow one holds up no more than these."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """For a connection, and between two pieces of an answer."""
    total_s: Annotated[float, Field(gt=0)] = 120.0
    """For all transfers of one file together, however steadily it drips."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further attempts after a failure that may pass."""
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the first retry; doubled before each further one."""
    max_wait_s: Annotated[float, Field(ge=0)] = 30.0
    """The longest pause, whatever a server's Retry-After says."""
    max_bytes: Annotated[int, Field(ge=1)] = 64 << 20
    """Of a file, unpacked."""
    max_redirects: Annotated[int, Field(ge=0)] = 5
    retry_failed: bool = False
    """Ask again for what failed in an earlier call and may have passed; a 404 never does."""
    user_agent: str = "phi3v-dist (image import)"
    """Some sites only answer one that names a person to write to."""


class Failure(Exception):
    """Why a file could not be had.

    again: another attempt may help. wait_s: not before then. permanent: a later call need not try either.
    """

    def __init__(self, reason: str, *, again: bool = False, wait_s: float = 0.0, permanent: bool = False):
        super().__init__(reason)
        self.reason, self.again, self.wait_s, self.permanent = shown_words(reason), again, wait_s, permanent


@dataclass
class _Partial:
    """A file that is coming in.

    expected_bytes: as announced; None: not announced. validator: by which the server can tell whether it is still the
    same file; "": it cannot.
    """

    path: Path
    num_bytes: int = 0
    expected_bytes: int | None = None
    validator: str = ""

    @property
    def progress(self) -> str:
        expected = "" if self.expected_bytes is None else f" of {self.expected_bytes:,}"
        return f"{self.num_bytes:,}{expected} bytes came"


def partial_path(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.partial")


class Transfers:
    """All transfers of a call; an async context in the thread of its event loop.

    Each slot has a client of its own: in a shared one every request looks at all connections there are, which costs
    four times the CPU at 64.
    """

    def __init__(self, settings: DownloadSettings, verify: Verify | None):
        self.settings, self.verify = settings, verify
        self._slots = anyio.Semaphore(settings.concurrency)
        self._clients: list[httpx.AsyncClient] = []  # those of free slots
        self._certificates = httpx.create_ssl_context()
        self._verifiers = anyio.CapacityLimiter(os.cpu_count() or 1)  # each holds a file in memory

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for client in self._clients:
            await client.aclose()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[httpx.AsyncClient]:
        async with self._slots:
            client = self._clients.pop() if self._clients else self._new_client()
            try:
                yield client
            finally:
                self._clients.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        settings = self.settings
        return httpx.AsyncClient(
            headers={"User-Agent": settings.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
            timeout=settings.timeout_s, follow_redirects=True, max_redirects=settings.max_redirects,
            limits=httpx.Limits(max_keepalive_connections=KEPT_CONNECTIONS), verify=self._certificates,
            event_hooks={"request": [_check_request]},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # else they pile up
        )  # fmt: skip

    async def fetch(self, url: str, path: Path) -> tuple[int, Failure | None]:
        """(number of attempts, why the file is not at `path` now)."""
        if failure := _refusal_of_url(url):
            return 0, failure
        partial = _Partial(partial_path(path))
        left_s, attempts = self.settings.total_s, 0
        while True:
            attempts += 1
            async with self._slot() as client:
                begin = anyio.current_time()
                failure = await self._attempt(client, url, partial, left_s)
                left_s -= anyio.current_time() - begin
            failure = failure or await self._look_at(partial.path)
            if failure is None:
                partial.path.replace(path)
                return attempts, None
            if not failure.again or attempts > self.settings.retries:
                partial.path.unlink(missing_ok=True)
                return attempts, failure
            pause_s = max(self.settings.backoff_s * 2 ** (attempts - 1), failure.wait_s)
            await anyio.sleep(min(pause_s, self.settings.max_wait_s))  # without a slot: others go on

    async def _attempt(self, client: httpx.AsyncClient, url: str, partial: _Partial, limit_s: float) -> Failure | None:
        try:
            with anyio.fail_after(limit_s):
                await self._receive(client, url, partial)
        except Failure as failure:
            return failure
        except TimeoutError:
            return Failure(f"not done after {self.settings.total_s:g} s, {partial.progress}")
        except httpx.TimeoutException:
            return Failure(f"nothing came for {self.settings.timeout_s:g} s, {partial.progress}", again=True)
        except httpx.TooManyRedirects:
            return Failure(f"redirected more than {self.settings.max_redirects} times", permanent=True)
        except httpx.RequestError as error:
            return Failure(f"{error or type(error).__name__}, {partial.progress}", again=True)
        except (httpx.InvalidURL, ValueError) as error:  # a name no host can have, a number with 5,000 digits
            return Failure(f"unusable address or answer: {error}", permanent=True)
        return None if partial.num_bytes else Failure("the server sent no bytes", again=True)

    async def _receive(self, client: httpx.AsyncClient, url: str, partial: _Partial) -> None:
        """One request. Goes on where the last one was cut off, if the server can and still has the same file."""
        resumed = bool(partial.num_bytes and partial.validator)
        headers = {"Range": f"bytes={partial.num_bytes}-", "If-Range": partial.validator} if resumed else {}
        async with client.stream("GET", url, headers=headers) as response:
            if resumed and response.status_code in (206, 416):
                if _goes_on(partial, response):
                    return  # nothing is missing: it was the announced length that was wrong
            elif response.status_code == 200:
                _restart(partial, response)
            else:
                raise _refusal(response)
            self._check_size(partial.expected_bytes or 0)
            unpacker = _unpacker(response)
            with partial.path.open("ab" if partial.num_bytes else "wb") as file:
                async for raw in response.aiter_raw():  # as it comes: what a chunker holds back is lost with the line
                    for block in _unpacked(raw, unpacker):
                        partial.num_bytes += len(block)
                        self._check_size(partial.num_bytes)
                        file.write(block)
        if unpacker and not unpacker.eof or partial.expected_bytes not in (None, partial.num_bytes):
            raise Failure(f"cut off, {partial.progress}", again=True)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.settings.max_bytes:
            raise Failure(f"larger than the limit of {self.settings.max_bytes:,} bytes")

    async def _look_at(self, path: Path) -> Failure | None:
        if self.verify is None:
            return None
        verify = self.verify
        reason = await run_sync(lambda: verify(path.read_bytes()), limiter=self._verifiers)
        return Failure(reason, permanent=True) if reason else None


def _refusal_of_url(url: str) -> Failure | None:
    try:
        _check_address(httpx.URL(url))
    except Failure as failure:
        return failure
    except (httpx.InvalidURL, ValueError) as error:
        return Failure(f"not an address: {error}", permanent=True)
    return None


async def _check_request(request: httpx.Request) -> None:
    """Redirects come by here as well."""
    _check_address(request.url)


def _check_address(url: httpx.URL) -> None:
    if url.scheme not in SCHEMES:
        raise Failure(f"{url.scheme or 'no scheme'}: is not fetched, only http: and https:", permanent=True)
    if not url.host or max(map(len, url.raw_host.split(b"."))) > MAX_LABEL or not 0 < (url.port or 80) < 1 << 16:
        raise Failure(f"not an address: {url.netloc.decode()!r} is no host and port", permanent=True)


def _refusal(response: httpx.Response) -> Failure:
    """What a status other than 200 means."""
    code = response.status_code
    phrase = HTTPStatus(code).phrase if code in set(HTTPStatus) else ""  # the server's own words are a stranger's
    again = code in TRY_AGAIN or code >= 500
    return Failure(f"HTTP {code} {phrase}".rstrip(), again=again, wait_s=_retry_after_s(response), permanent=not again)


def _retry_after_s(response: httpx.Response) -> float:
    """The header's seconds, also from its other form, a date; 0 when there is none."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _restart(partial: _Partial, response: httpx.Response) -> None:
    """From the first byte, of what the server has now."""
    headers = response.headers
    packed = "content-encoding" in headers  # lengths and ranges would count packed bytes
    etag, length = headers.get("etag", ""), headers.get("content-length", "")
    partial.num_bytes = 0
    partial.expected_bytes = int(length) if length.isdecimal() and not packed else None
    partial.validator = "" if packed else etag if etag.startswith('"') else headers.get("last-modified", "")


def _goes_on(partial: _Partial, response: httpx.Response) -> bool:
    """Make sure that the answer to a range request fits; whether the file is whole already."""
    place, _, total = response.headers.get("content-range", "").partition("/")
    partial.expected_bytes = int(total) if total.isdecimal() else None
    if response.status_code == 416 and partial.expected_bytes == partial.num_bytes:
        return True
    fits = place.startswith(f"bytes {partial.num_bytes}-") and "content-encoding" not in response.headers
    if response.status_code == 416 or not fits:
        partial.validator = ""
        raise Failure(f"the server would not go on from byte {partial.num_bytes:,}", again=True)
    return False


def _unpacker(response: httpx.Response) -> Any:
    """For the few servers that pack although they were asked not to."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise Failure(f"packed as {encoding!r}, which was not asked for", permanent=True)
    return None if encoding == "identity" else zlib.decompressobj(wbits=31)


def _unpacked(raw: bytes, unpacker: Any) -> Iterator[bytes]:
    """Piece by piece, so that a bomb is noticed before it is in memory."""
    if unpacker is None:
        yield raw
        return
    is_full = False
    while raw or is_full:  # a full block can leave some behind even when all was taken in
        try:
            block = unpacker.decompress(raw, BLOCK_BYTES)
        except zlib.error as error:
            raise Failure(f"its gzip is damaged: {error}", permanent=True) from error
        raw, is_full = unpacker.unconsumed_tail, len(block) == BLOCK_BYTES
        yield block
