"""Requests of the real W&B client → the answers of its server, on 127.0.0.1, as far as this repository needs them.

What comes in: HTTP of wandb-core, of `wandb sync` and of wandb-workspaces. What goes out: `stub.runs` and `stub.views`,
what a server would now hold, and `stub.operations`, what was asked for. Surprise: the client is content with very
little. An operation that is not known here is answered by an empty object, which it takes for "this server is old";
only `CreateRunFiles` must be answered in full, for its core dies of anything else (OBSERVABILITY.md §1).

    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        stub.faults["UpsertBucket"] = [answer(429), answer(500)]      # its third time is fine
"""

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

ENTITY = "stub-entity"
ROWS, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")


class Answer(NamedTuple):
    """One answer that is not a good one. after_s: silence before it."""

    status: int
    body: bytes
    after_s: float = 0.0


def answer(status: int, body: bytes = b'{"errors": [{"message": "scripted"}]}', after_s: float = 0.0) -> Answer:
    return Answer(status, body, after_s)


@dataclass
class StubRun:
    """A run as the server has it. lines: by offset, so that what is sent twice is there once."""

    entity: str
    project: str
    name: str
    config: str = "{}"
    display_name: str | None = None
    lines: dict[int, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]


class WandbStub:
    """faults: operation (or "file_stream") → what its next requests meet, one each; None: a good answer.

    lose: rows that the server says it took and did not, by their offset.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StubRun] = {}
        self.views: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self.keys: set[str] = set()
        self.faults: dict[str, list[Answer | None]] = defaultdict(list)
        self.lose: Callable[[int], bool] = lambda offset: False
        self.lock = threading.Lock()
        self._stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: nothing listens any more, and connections that wait are let go."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, operation: str) -> Answer | None:
        with self.lock:
            self.operations.append(operation)
            scripted = self.faults[operation].pop(0) if self.faults[operation] else None
        if scripted and scripted.after_s:
            self._stopping.wait(scripted.after_s)
        return scripted

    def run(self, variables: dict[str, Any]) -> StubRun | None:
        names = ("name", "run", "runName", "runID", "runId", "run_name")
        return next((self.runs[variables[name]] for name in names if variables.get(name) in self.runs), None)


def _data(stub: WandbStub, operation: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """What a healthy server says to an operation."""
    run = stub.run(variables)
    if operation == "UpsertBucket":
        return _upsert_run(stub, variables)
    if operation == "RunResumeStatus":
        return {"model": {"id": "m", "name": variables["project"], "entity": {"id": "e", "name": ENTITY},
                          "bucket": run and _resume_status(run)}}  # fmt: skip
    if operation in ("Viewer", "GetDefaultEntity"):
        return {"viewer": {"id": "u", "entity": ENTITY, "username": "stub", "name": "stub", "email": "s@example.org",
                           "flags": "{}", "admin": False, "teams": {"edges": []}}}  # fmt: skip
    if operation == "CreateRunFiles":
        names = variables["files"]
        files = [{"name": name, "uploadUrl": f"{stub.url}/upload/{name}"} for name in names]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
    if operation == "CreateArtifact":  # COMMITTED: it has these bytes already, so that none are sent
        sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
        return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
    if operation == "NotifyScriptableRunAlert":
        stub.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}
    if operation in ("UpsertView2", "upsertView", "UpsertView"):
        stub.views.append(variables)
        kept = {"id": variables.get("id") or "dmlldw==", "name": variables["name"], "type": variables["type"]}
        more = {"displayName": variables["displayName"], "description": variables["description"]}
        place = {"name": variables["projectName"], "entityName": variables["entityName"]}
        view = kept | more | {"project": place, "spec": variables["spec"]}
        view |= {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        return {"upsertView": {"view": view, "inserted": True}}
    if operation == "ProjectInternalId":
        return {"project": {"internalId": "1"}}
    if operation == "GetProjects":
        node = {"id": "p", "name": "phi3v-dist", "entityName": ENTITY, "createdAt": "2026-01-01T00:00:00",
                "isBenchmark": False, "user": None, "internalId": "1"}  # fmt: skip
        page = {"endCursor": None, "hasNextPage": False}
        return {"models": {"edges": [{"cursor": "c", "node": node}], "pageInfo": page}}
    if "historyLineCount" in query:
        return {"project": {"internalId": "1", "run": run and _whole_run(run)}}
    return {}


def _upsert_run(stub: WandbStub, variables: dict[str, Any]) -> dict[str, Any]:
    name, project = variables["name"], variables.get("project") or "uncategorized"
    inserted = name not in stub.runs
    run = stub.runs.setdefault(name, StubRun(variables.get("entity") or ENTITY, project, name))
    run.config = variables.get("config") or run.config
    run.display_name = variables.get("displayName") or run.display_name
    place = {"id": "p", "name": project, "entity": {"id": "e", "name": run.entity}}
    bucket = {"id": "r", "name": name, "displayName": run.display_name or name, "description": None,
              "config": run.config, "project": place, "historyLineCount": len(run.lines)}  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _whole_run(run: StubRun) -> dict[str, Any]:
    """As `wandb.Api().run()` wants it."""
    texts = {"id": "r", "name": run.name, "displayName": run.name, "state": "finished", "config": run.config}
    texts |= {"createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "systemMetrics": "{}"}
    nothing = dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes", "historyKeys"))
    more = {
        "tags": [],
        "user": {"name": "stub", "username": "stub"},
        "readOnly": False,
        "projectId": "1",
        "summaryMetrics": json.dumps(run.summary),
    }
    return {**texts, **nothing, **more, "historyLineCount": len(run.lines)}


def _resume_status(run: StubRun) -> dict[str, Any]:
    tail = json.dumps([run.lines[offset] for offset in sorted(run.lines)][-1:])
    return {
        "id": "r", "name": run.name, "summaryMetrics": json.dumps(run.summary), "displayName": run.name,
        "logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": 0, "historyTail": tail,
        "eventsTail": "[]", "config": run.config, "tags": [], "wandbConfig": json.dumps({"t": 1}),
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    stub: WandbStub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802  # the library's name
        body = self._body()
        if self.path.endswith("/file_stream"):
            self._file_stream(json.loads(body))
            return
        if not self.path.endswith("/graphql"):
            self._send(404, b"{}")
            return
        asked = json.loads(body)
        found = _OPERATION.search(asked.get("query") or "")
        operation = found.group(1) if found else "?"
        if key := self.headers.get("Authorization"):
            self.stub.keys.add(key)
        fault = self.stub.fault(operation)
        if fault:
            self._send(fault.status, fault.body)
            return
        with self.stub.lock:
            data = _data(self.stub, operation, asked["query"], asked.get("variables") or {})
        self._send(200, json.dumps({"data": data}).encode())

    def do_PUT(self) -> None:  # noqa: N802
        self._body()
        self._send(200, b"")

    def do_GET(self) -> None:  # noqa: N802
        self._send(200, b"{}")

    def _file_stream(self, sent: dict[str, Any]) -> None:
        fault = self.stub.fault("file_stream")
        if fault:
            self._send(fault.status, fault.body)
            return
        run = self.stub.runs[self.path.split("/")[-2]]
        with self.stub.lock:
            files = sent.get("files") or {}
            for place, line in enumerate(files.get(ROWS, {}).get("content", ())):
                offset = files[ROWS]["offset"] + place
                if not self.stub.lose(offset):
                    run.lines[offset] = line
            for line in files.get(SUMMARY, {}).get("content", ()):
                run.summary = json.loads(line)
            run.preempting = run.preempting or bool(sent.get("preempting"))
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode")
        self._send(200, b"{}")

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _send(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client gave up waiting, which is what a slow answer is for
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
