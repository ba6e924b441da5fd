"""A model fetched from a stand-in for the hub on the loopback, through the real client; then kept by its digests."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from conftest import REPOSITORY, environment
from huggingface_hub.utils import are_progress_bars_disabled

from phi3v_dist import config, run
from phi3v_dist.cli import prepare as launch_prepare
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.model import hub

REPO, COMMIT, OTHER_COMMIT = "someone/phi-3-vision", "a" * 40, "b" * 40
MORE = {"LICENSE": b"MIT\n", "README.md": b"# card\n", "modeling_phi3_v.py": b"raise RuntimeError('never imported')\n"}
UNWANTED = {"pytorch_model.bin": b"pickle", "optimizer.pt": b"pickle", "sub/config.json": b"{}", "photo.png": b"png"}


@dataclass
class Hub:
    """What the stand-in serves, and what it was asked for."""

    files: dict[str, bytes]
    cut_off: str = ""  # a file of which only half is sent before the connection drops
    half_way: Callable[[], object] | None = None  # called when half of the weights are sent
    gated: bool = False
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        self.served.asked.append(f"{self.command} {path}")
        if self.served.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith(f"api/models/{REPO}/"):
            return self.answer_api(*path.removeprefix(f"api/models/{REPO}/").split("/"))
        commit = self.served.commit
        name = path.removeprefix(f"{REPO}/resolve/{commit}/")
        if name == path or name not in self.served.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"})
        content = self.served.files[name]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, name == self.served.cut_off)

    def answer_api(self, kind: str, revision: str) -> None:
        if revision not in ("main", self.served.commit):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        entries = []
        for name, content in self.served.files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "pointerSize": 100} if name.endswith(".safetensors") else None
            tree = {"type": "file", "path": name, "oid": sha256[:40]} | ({"lfs": lfs | {"oid": sha256}} if lfs else {})
            sibling = {"rfilename": name, "blobId": sha256[:40]} | ({"lfs": lfs | {"sha256": sha256}} if lfs else {})
            entries.append((tree if kind == "tree" else sibling) | {"size": len(content)})
        body = entries if kind == "tree" else {"id": REPO, "sha": self.served.commit, "siblings": entries}
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str], cut_off: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            half = len(content) // 2
            self.wfile.write(content[:half])
            if self.served.half_way and self.path.endswith("model.safetensors"):
                self.served.half_way()
            if not cut_off:
                self.wfile.write(content[half:])
        self.close_connection = cut_off

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def served(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    state = Hub(files | MORE | UNWANTED)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"served": state}))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetched(served: Hub, tmp_path: Path) -> Path:
    hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    return tmp_path / "model"


@pytest.mark.fault(86, 87)
@pytest.mark.supports("weights", on="one process")
def test_a_model_arrives_whole_with_digests_and_without_pickles(fetched: Path, served: Hub) -> None:
    wanted = served.files.keys() - UNWANTED.keys()
    assert {path.name for path in fetched.iterdir()} == wanted | {"digests.json"}
    assert not any(name in asked for asked in served.asked for name in (".bin", ".pt", "sub/", ".png"))
    digests = json.loads((fetched / "digests.json").read_text())
    assert (digests["repo"], digests["revision"], digests["commit"]) == (REPO, "main", COMMIT)
    assert digests["files"] == {
        name: {"size_bytes": len(served.files[name]), "sha256": hashlib.sha256(served.files[name]).hexdigest()}
        for name in sorted(wanted)
    }
    assert not (fetched.parent / "model.partial").exists()


def test_a_download_shows_how_much_has_arrived(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, int, int | None]] = []
    found: list[tuple[bool, bool]] = []
    is_shown = Event()

    @contextmanager
    def show_progress(unit: str) -> Iterator[Callable[..., None]]:
        def report(task: str, done: int, total: int | None) -> None:
            reports.append((task, done, total))
            if task == f"downloading {REPO}" and total and 0 < done < total:
                is_shown.set()

        yield report

    monkeypatch.setattr(hub, "show_progress", show_progress)
    monkeypatch.setattr(hub, "LOOK_S", 0.01)
    served.half_way = lambda: found.append((is_shown.wait(60), are_progress_bars_disabled()))
    hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    assert found == [(True, True)], "shown before the end, without the client's own bars"
    assert not are_progress_bars_disabled()
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "model").iterdir() if path.name != "digests.json")
    assert (f"downloading {REPO}", size_bytes, size_bytes) in reports
    assert reports[-1] == (f"reading {tmp_path / 'model.partial'}", size_bytes, size_bytes)


def test_fetching_again_verifies_and_asks_the_hub_nothing(fetched: Path, served: Hub) -> None:
    served.asked.clear()
    for revision in ("main", COMMIT):
        assert hub.fetch(REPO, fetched, revision, endpoint=served.endpoint).commit == COMMIT
    assert not served.asked
    for repo, revision in ((REPO, OTHER_COMMIT), ("someone/else", "main")):
        with pytest.raises(CheckpointError, match=f"holds {REPO} at main: name another --out"):
            hub.fetch(repo, fetched, revision, endpoint=served.endpoint)


def test_a_dropped_connection_leaves_nothing_that_looks_finished_and_the_next_call_goes_on(
    served: Hub, tmp_path: Path
) -> None:
    served.cut_off = "model.safetensors"
    with pytest.raises(CheckpointError, match="run the same command again"):
        hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    assert not (tmp_path / "model").exists() and not list(tmp_path.rglob("digests.json"))
    served.cut_off = ""
    served.asked.clear()
    hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    hub.verify(tmp_path / "model")
    assert f"GET {REPO}/resolve/{COMMIT}/config.json" not in served.asked  # it had arrived the first time


def test_a_hub_that_vanished_does_not_turn_the_remains_into_a_model(served: Hub, tmp_path: Path) -> None:
    served.cut_off = "model.safetensors"
    for endpoint in (served.endpoint, "http://127.0.0.1:9"):  # nobody listens on the second
        with pytest.raises(CheckpointError, match="cannot be fetched.*run the same command again"):
            hub.fetch(REPO, tmp_path / "model", endpoint=endpoint)
    assert not (tmp_path / "model").exists()


def test_bytes_that_are_not_the_hubs_are_refused_and_fetched_anew(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_sha256", lambda folder, names: [(name, "0" * 64) for name in names])
        with pytest.raises(CheckpointError, match=r"model\.safetensors arrived with other bytes"):
            hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    hub.verify(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "remove", "reason"),
    [
        (b'{"model_type": "llama"}', "", "no Phi-3-vision: found llama"),
        (b"[", "", "no Phi-3-vision: found a config.json that says nothing"),
        (None, "config.json", "no Phi-3-vision: found no config.json"),
        (None, "model.safetensors", "no safetensors; pickles"),
    ],
)
def test_another_model_is_refused_before_the_download(
    config: bytes | None, remove: str, reason: str, served: Hub, tmp_path: Path
) -> None:
    served.files |= {"config.json": config} if config else {}
    served.files.pop(remove, None)
    with pytest.raises(CheckpointError, match=reason):
        hub.fetch(REPO, tmp_path / "model", endpoint=served.endpoint)
    assert not any("safetensors" in asked for asked in served.asked)
    assert not list(tmp_path.glob("model*"))


def test_what_the_hub_refuses_is_one_clear_line(served: Hub, tmp_path: Path) -> None:
    out = tmp_path / "model"
    asked = [
        ("someone/nobody", "main", "no such model"),
        (REPO, "v9", "no revision 'v9'"),
        ("a b", "main", "OWNER/NAME"),
    ]
    for repo, revision, reason in asked:
        with pytest.raises(CheckpointError, match=reason) as caught:
            hub.fetch(repo, out, revision, endpoint=served.endpoint)
        assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    served.gated = True
    with pytest.raises(CheckpointError, match="gated: accept its terms"):
        hub.fetch(REPO, out, endpoint=served.endpoint)
    out.mkdir()
    with pytest.raises(CheckpointError, match="not ours to fill"):
        hub.fetch(REPO, out, endpoint=served.endpoint)


@pytest.mark.fault(86)
def test_every_file_that_is_not_as_fetched_is_named(fetched: Path) -> None:
    hub.verify(fetched)
    hub.check_sizes(fetched)
    weights = fetched / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    hub.check_sizes(fetched)  # the size is right
    (fetched / "README.md").write_text("short")
    (fetched / "LICENSE").unlink()
    shutil.copy(weights, fetched / "other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        hub.verify(fetched)
    named = {Path(p.split(":")[0]).name: p for p in caught.value.problems}
    assert set(named) == {"model.safetensors", "README.md", "LICENSE", "other.safetensors"}
    assert "sha256 differs" in named["model.safetensors"] and "missing" in named["LICENSE"]
    assert "5 bytes, fetched were 7" in named["README.md"] and "not in digests.json" in named["other.safetensors"]


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', "[1]", '{"files": {"a": 1}}'])
def test_damaged_digests_are_an_error_not_a_pass(content: str, fetched: Path) -> None:
    (fetched / "digests.json").write_text(content)
    for look in (hub.verify, hub.check_sizes):
        with pytest.raises(CheckpointError, match="digests.json is not what"):
            look(fetched)


def test_a_truncated_file_is_named_before_a_run(fetched: Path, settings_tree: dict, config_file: Path) -> None:
    overrides = [f"model.path={fetched}"]
    assert run.problems(config.load(config_file, overrides), world_size=1) == []
    weights = fetched / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (problem,) = run.problems(config.load(config_file, overrides), world_size=1)
    assert "model.safetensors: has" in problem and "fetched were" in problem


def test_the_command_fetches_verifies_and_says_what_it_needs(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models" / "phi"
    extra = {"HF_ENDPOINT": served.endpoint, "NO_PROXY": "*", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "launch/prepare.py", "weights", REPO, "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(**extra), capture_output=True, text=True)
    assert done.returncode == 0 and f"at commit {COMMIT}" in done.stdout, done.stderr

    def prepare(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["prepare.py", "weights", *words])
        launch_prepare.run_command()

    prepare("--verify", str(out))
    (out / "LICENSE").unlink()
    with pytest.raises(CheckpointError, match="LICENSE: missing"):
        prepare("--verify", str(out))
    with pytest.raises(CheckpointError, match=r"digests\.json cannot be read"):
        prepare("--verify", str(tmp_path))
    for words in ([REPO], [], ["--out", str(out)], [REPO, "--verify", str(out)]):
        with pytest.raises(ConfigError, match="--out FOLDER"):
            prepare(*words)
