"""Path → bytes, as an HTTP/1.1 server on 127.0.0.1 that misbehaves by script.

What comes in: `server.files[path] = bytes`, and faults for the first, second, … request of a path. What goes out: real
HTTP over a real socket, and `server.log`, what was asked for. Surprise: nothing here is random or depends on a clock.
The n-th GET of a path always meets the n-th fault of its script, so a test can say exactly what a client must do.

    with LoopbackServer({"/a.jpg": data}) as server:
        server.script("/a.jpg", RESET, drop_after(100))  # the third GET is fine
        server.script("/b.jpg", always=status(404))
        client.get(server.url("/a.jpg"))
        assert server.log == [Request("GET", "/a.jpg", None), ...]

Every wait ends when the server stops, and `with` leaves no thread behind.
"""

import gzip
import hashlib
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self

BLOCK_BYTES = 1 << 16
STALL_S = 60.0  # no wait is longer than this, even if a test forgets to stop the server
CONTENT_TYPES = {"jpg": "image/jpeg", "png": "image/png", "tar": "application/x-tar", "json": "application/json"}


class Request(NamedTuple):
    """What a client asked for. `path` includes the query; `range` is the header's value, such as `bytes=10-`."""

    method: str
    path: str
    range: str | None


@dataclass(frozen=True)
class Fault:
    """How one answer differs from a good one.

    reset: end the connection before any answer, with a reset.
    status, headers: instead of 200 or 206; a body that says so in HTML replaces the file unless `body` is given.
    body: instead of the file's bytes.
    length_error: added to the Content-Length that is announced; the bytes sent stay the same.
    drop_after: close the connection after so many bytes of the body, having announced all of them.
    stall_after: say nothing more after so many bytes of the body, until the server stops.
    drip: (bytes, seconds): send so many bytes, wait, and so on.
    endless_bytes: a body without Content-Length that goes on for so many bytes.
    ignore_range: answer a range request with 200 and everything, as servers without ranges do.
    """

    reset: bool = False
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    length_error: int = 0
    drop_after: int | None = None
    stall_after: int | None = None
    drip: tuple[int, float] | None = None
    endless_bytes: int | None = None
    ignore_range: bool = False


HTML = b"<!DOCTYPE html><html><body><h1>Sorry, this page has moved</h1></body></html>\n"
RESET = Fault(reset=True)
STALL = Fault(stall_after=0)
EMPTY = Fault(body=b"")
HTML_AS_JPEG = Fault(body=HTML, headers={"Content-Type": "image/jpeg"})
NO_RANGE = Fault(ignore_range=True)
ENDLESS = Fault(endless_bytes=256 << 20)


def status(code: int, **headers: str) -> Fault:
    """An error page; `Retry_After="1"` becomes the header Retry-After."""
    return Fault(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})


def redirect(location: str, code: int = 302) -> Fault:
    return Fault(status=code, headers={"Location": location}, body=b"")


def drop_after(num_bytes: int) -> Fault:
    return Fault(drop_after=num_bytes)


def stall_after(num_bytes: int) -> Fault:
    return Fault(stall_after=num_bytes)


def drip(num_bytes: int, every_s: float) -> Fault:
    return Fault(drip=(num_bytes, every_s))


def wrong_length(error: int) -> Fault:
    """Positive: more is announced than comes. Negative: less."""
    return Fault(length_error=error)


def gzip_bomb(unpacked_bytes: int) -> Fault:
    """A small body that says it is compressed, whether the client allowed that or not."""
    return Fault(body=gzip.compress(bytes(unpacked_bytes)), headers={"Content-Encoding": "gzip"})


class LoopbackServer:
    """A context manager; the port is one that was free.

    files: path → bytes; may be changed at any time. The ETag is a hash of the bytes.
    log: all requests so far, in the order in which they came.
    most_at_once: the largest number of requests that were being answered at the same time.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        self.files = dict(files or {})
        self.log: list[Request] = []
        self.most_at_once = 0
        self.stopping = threading.Event()
        self._scripts: dict[tuple[str, str], tuple[tuple[Fault, ...], Fault | None]] = {}
        self._count: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._lock = threading.Lock()
        self._active = 0
        self._sockets: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.loopback = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def origin(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def url(self, path: str) -> str:
        return self.origin + path

    def script(self, path: str, *faults: Fault, always: Fault | None = None, method: str = "GET") -> None:
        """The coming requests of `path` meet `faults` in turn, and then `always`; None: a good answer."""
        with self._lock:
            self._scripts[method, path] = (faults, always)
            self._count[method, path] = 0

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self.log.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._thread.join()
        with self._lock:
            open_sockets = list(self._sockets)
        for each in open_sockets:  # a kept-alive connection waits for its next request
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster
        self._http.server_close()  # waits for the handlers' threads

    def begin(self, request: Request) -> Fault:
        """Note a request; how to answer it."""
        with self._lock:
            self.log.append(request)
            self._active += 1
            self.most_at_once = max(self.most_at_once, self._active)
            name = (request.method, request.path)
            faults, always = self._scripts.get(name, ((), None))
            number = self._count[name]
            self._count[name] += 1
        return (faults[number] if number < len(faults) else always) or Fault()

    def end(self) -> None:
        with self._lock:
            self._active -= 1

    def connected(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.add(connection)
        if self.stopping.is_set():
            connection.close()

    def disconnected(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 256
    loopback: LoopbackServer

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.loopback.connected(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.loopback.disconnected(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms behind its headers
    server: _Http

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal; `LoopbackServer.log` has it all."""

    def _answer(self) -> None:
        loopback = self.server.loopback
        fault = loopback.begin(Request(self.command, self.path, self.headers.get("Range")))
        try:
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            else:
                self._send(fault, loopback.files.get(self.path.partition("?")[0]))
        except OSError:
            self.close_connection = True  # the client went away
        finally:
            loopback.end()

    def _send(self, fault: Fault, file: bytes | None) -> None:
        code, body, headers = self._good_answer(file, fault.ignore_range)
        if fault.status is not None:
            code, body, headers = fault.status, HTML, {"Content-Type": "text/html"}
        if fault.body is not None:
            code, body = fault.status or 200, fault.body
            headers = {"Content-Type": headers["Content-Type"]}
        headers |= fault.headers
        if fault.endless_bytes is None:
            headers["Content-Length"] = str(len(body) + fault.length_error)
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.endless_bytes is not None or fault.length_error or fault.drop_after is not None:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(fault, body)

    def _good_answer(self, file: bytes | None, ignore_range: bool) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers), as a well-behaved server would give them."""
        if file is None:
            return 404, HTML, {"Content-Type": "text/html"}
        suffix = self.path.partition("?")[0].rpartition(".")[2]
        headers = {"Content-Type": CONTENT_TYPES.get(suffix, "application/octet-stream")}
        etag = f'"{hashlib.sha256(file).hexdigest()[:16]}"'
        headers["ETag"] = etag
        if ignore_range:
            return 200, file, headers
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or wanted.groups() == ("", "") or self.headers.get("If-Range", etag) != etag:
            return 200, file, headers
        first, last = wanted.groups()
        begin = int(first) if first else max(0, len(file) - int(last))
        end = min(len(file), int(last) + 1) if first and last else len(file)
        if begin >= end:
            return 416, b"", headers | {"Content-Range": f"bytes */{len(file)}"}
        return 206, file[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(file)}"}

    def _send_body(self, fault: Fault, body: bytes) -> None:
        stopping = self.server.loopback.stopping
        step, pause_s = fault.drip or (BLOCK_BYTES, 0.0)
        end = len(body)
        for limit in (fault.drop_after, fault.stall_after):
            end = end if limit is None else min(end, limit)
        for block in _endless(fault.endless_bytes) if fault.endless_bytes else _blocks(body[:end], step):
            self.wfile.write(block)
            if stopping.wait(pause_s) if pause_s else stopping.is_set():
                break
        if fault.stall_after is not None:
            stopping.wait(STALL_S)
            self.close_connection = True


def _blocks(body: bytes, step: int) -> Iterator[bytes]:
    for begin in range(0, len(body), step):
        yield body[begin : begin + step]


def _endless(num_bytes: int) -> Iterator[bytes]:
    for _ in range(0, num_bytes, BLOCK_BYTES):
        yield bytes(BLOCK_BYTES)
