"""Canaries: credentials that must be found nowhere, and commands that must never run."""

import base64
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import yaml
from conftest import REPOSITORY, environment, write_samples
from loopback import LoopbackServer

from phi3v_dist import secrets
from phi3v_dist.config import dump, load
from phi3v_dist.data.templates import fill_template
from phi3v_dist.errors import ConfigError, Phi3VError

TIMEOUT_S = 280
CANARIES = {
    "WANDB_API_KEY": "canary0wandb" * 3 + "0000",
    "HF_TOKEN": "hf_canary1huggingface4711",
    "AWS_SECRET_ACCESS_KEY": "canary2/aws+secret/4711=",
    "AWS_SESSION_TOKEN": "canary3 session\ttoken 4711",
}
SIGNATURE = "canary4signature4711"


@pytest.fixture
def canaries(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def spellings(secret: str) -> set[bytes]:
    """As a program might have written it; no more than its middle may be found either."""
    plain = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1], secret[2:-2]}
    return {text.encode() for text in plain} | {base64.b64encode(secret.encode())[:-4]}


def leaks(*contents: bytes) -> list[str]:
    """Names of the canaries that are somewhere in there."""
    everything = {"signature": SIGNATURE, **CANARIES}
    return [name for name, secret in everything.items() for s in spellings(secret) if any(s in c for c in contents)]


@pytest.mark.fault(92)
def test_values_of_secret_variables_are_replaced_however_they_are_spelled(canaries):
    text = " ".join(f"{value} {quote(value)} {value!r} {json.dumps(value)}" for value in CANARIES.values())
    assert leaks(text.encode())
    shown = secrets.redacted(text)
    assert leaks(shown.encode()) == [] and shown.count(secrets.HIDDEN) == 4 * len(CANARIES)


@pytest.mark.fault(92)
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://user:pass@host/a.tar?x=1 failed", "GET https://***@host/a.tar?x=1 failed"),
        ("https://ghp_token@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("https://h/a?X-Amz-Date=5&X-Amz-Signature=0abc&x=1", "https://h/a?X-Amz-Date=5&X-Amz-Signature=***&x=1"),
        ("https://h/a?X-Amz-Credential=AK%2F1&X-Amz-Security-Token=q", "https://h/a?X-Amz-Credential=***&X-Amz-Security-Token=***"),
        ("'https://a.blob/x?sv=1&sig=abc%3D', 'y'", "'https://a.blob/x?sv=1&sig=***', 'y'"),
        ("https://h/x?access_token=abc#part and ?token=abc", "https://h/x?access_token=***#part and ?token=***"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "Authorization: Basic ***"),
        ("{'authorization': 'Bearer abcdefgh12345678'}", "{'authorization': 'Bearer ***'}"),
        ("git@github.com:a/b, mail@example.org, s3://bucket/key=3/x, Basic training", None),
        ("step=3 tokens=4096 key=value data.train.0.weight=2", None),
    ],
)  # fmt: skip
def test_secret_parts_of_addresses_are_replaced_and_other_words_stay(text, shown):
    assert secrets.redacted(text) == (text if shown is None else shown)


def test_names_decide_what_is_secret(tmp_path):
    key_file = tmp_path / "google-key.json"
    key_file.touch()
    found = secrets.names(
        {
            "OPENAI_API_KEY": "12345678", "MY_PASSWORD": "12345678", "GITHUB_PAT": "12345678", "apikey": "12345678",
            "SHORT_TOKEN": "1234567", "TOKENIZERS_PARALLELISM": "falsefalse", "MAX_TOKENS": "4096000000",
            "GOOGLE_APPLICATION_CREDENTIALS": str(key_file), "HF_TOKEN_PATH": "/home/x/token", "KEYBOARD": "12345678",
            "SSH_AUTH_SOCK": "/tmp/agent/12345678", "PWD": "/home/somebody", "AWS_SECRET_ACCESS_KEY": "/no+file/12",
        }
    )  # fmt: skip
    assert found == ["OPENAI_API_KEY", "MY_PASSWORD", "GITHUB_PAT", "apikey", "AWS_SECRET_ACCESS_KEY"]


@pytest.mark.fault(92)
def test_a_password_in_a_setting_is_refused_with_the_place_where_it_belongs(tmp_path):
    tree = {"model": {"path": "m"}, "data": {"train": [{"shards": "a.tar"}]}, "train": {"steps": 200}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load(path, ["data.train.0.shards=https://me:hunter22@host/a.tar", "observe.wandb_entity=https://k3y@x"])
    first, second = caught.value.problems
    assert "`data.train.0.shards.0` is 'https://***@host/a.tar'" in first and "~/.netrc" in first
    assert "`observe.wandb_entity`" in second and "hunter22" not in str(caught.value)


@pytest.mark.fault(92)
def test_a_presigned_address_is_allowed_and_redacted_where_settings_are_written(tmp_path, canaries):
    tree = {"model": {"path": "m"}, "data": {"train": [{"shards": "a.tar"}]}, "train": {"steps": 200}}
    path = tmp_path / "run.yaml"
    address = f"https://host/a.tar?X-Amz-Date=1&X-Amz-Signature={SIGNATURE}"
    tree["data"]["train"][0] |= {"shards": address, "name": "${oc.env:HF_TOKEN}"}
    path.write_text(yaml.safe_dump(tree))
    settings = load(path)
    assert settings.data.train[0].shards == [address]
    (source,) = dump(settings)["data"]["train"]
    assert (source["shards"], source["name"]) == (["https://host/a.tar?X-Amz-Date=1&X-Amz-Signature=***"], "***")


CRASH = """
import logging, os, sys, threading, warnings
from phi3v_dist.cli.app import run_script
secret = os.environ["AWS_SECRET_ACCESS_KEY"]

def main():
    logging.warning("with %s", secret)
    other = logging.getLogger("other")
    other.addHandler(logging.StreamHandler(sys.stderr))
    other.warning("other %s", secret)
    warnings.warn(secret)
    print(secret, file=sys.stderr)
    try:
        raise ValueError(secret)
    except ValueError:
        logging.exception("caught")
    thread = threading.Thread(target=lambda: os.stat(secret))
    thread.start()
    thread.join()
    raise RuntimeError(secret)

run_script(main)
"""


@pytest.mark.fault(92)
def test_logs_prints_warnings_and_tracebacks_of_any_thread_are_redacted(canaries):
    env = environment(PYTHONWARNINGS="default")
    done = subprocess.run([sys.executable, "-c", CRASH], env=env, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 1 and leaks(done.stdout, done.stderr) == []
    assert done.stdout.count(b"***") == 3 and b"Traceback" in done.stdout
    assert b"RuntimeError: ***" in done.stderr and b"Exception in thread" in done.stderr
    assert done.stderr.count(b"***") >= 5


class Watch:
    """Command lines of a process and all below it, sampled while it runs."""

    def __init__(self, words: list[str], env: dict[str, str]):
        self.lines: set[bytes] = set()
        with subprocess.Popen(
            words, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, umask=0
        ) as process:  # fmt: skip
            watcher = threading.Thread(target=self._sample, args=(process,))
            watcher.start()
            self.stdout, self.stderr = process.communicate(timeout=TIMEOUT_S)
            watcher.join()
        self.returncode = process.returncode

    def _sample(self, process: subprocess.Popen) -> None:
        while process.poll() is None:
            for each in (process.pid, *(child.pid for child in self._below(process.pid))):
                try:
                    self.lines.add(Path(f"/proc/{each}/cmdline").read_bytes())
                except OSError:
                    continue  # it has ended
            time.sleep(0.1)

    @staticmethod
    def _below(pid: int) -> list[psutil.Process]:
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return []


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """Settings, a store and a model folder full of canaries; `fired` is where a command would leave its file."""
    import conftest

    folder = tmp_path_factory.mktemp("canaries")
    fired = folder / "fired"
    fired.mkdir()
    model = shutil.copytree(tiny_model, folder / "model")
    for number, name in enumerate(("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt")):
        (model / name).write_bytes(pickle.dumps(Touch(fired / f"model-{number}")))
    touch = f"__import__('os').system('touch {fired}/remote')\n"
    for name in ("modeling_phi3_v.py", "processing_phi3_v.py", "configuration_phi3_v.py"):
        (model / name).write_text(touch)
    write_samples(folder / "train.tar", range(0, 24))
    write_samples(folder / "validation.tar", range(100, 108))
    tree = conftest.settings_tree.__wrapped__(tiny_model, folder, folder)
    tree["model"]["path"] = str(model)
    tree["train"]["steps"] = 4
    tree["checkpoint"]["every_steps"] = 2
    tree["eval"]["final_samples"] = 2
    command = f"$(touch {fired}/shell) `touch {fired}/ticks`; touch {fired}/words"
    tree["observe"] = {"wandb": "offline", "wandb_project": "phi3v-dist"}
    tree["eval"]["fields"]["command"] = {"pattern": f"(x)|{command.replace('(', '.').replace(')', '.')}"}
    with LoopbackServer({"/train.tar": (folder / "train.tar").read_bytes()}) as server:
        address = server.url(f"/train.tar?X-Amz-Date=1&X-Amz-Signature={SIGNATURE}")
        tree["data"]["train"] = [{"shards": address, "name": command}]
        tree["data"]["validation"] = [{"shards": str(folder / "validation.tar")}]
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        places = {"XDG_CACHE_HOME": str(folder / "cache"), "NETRC": str(folder / "none")}
        env = environment(**CANARIES, **places, ADDRESS=address, CRASH_STEP="4")
        yield folder, env


def torchrun(folder: Path, env: dict[str, str]) -> Watch:
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", "tests/secret_run.py"]
    return Watch([*words, "--config", str(folder / "run.yaml")], env)


@pytest.fixture(scope="module")
def crashed(world):
    """A real run on two ranks that saved at step 2 and crashed in step 4."""
    return torchrun(*world)


def outputs(folder: Path) -> dict[str, bytes]:
    """Every byte that was written: the runs (W&B's folder is in there) and the user's cache, names included."""
    roots = (folder / "runs", folder / "cache")
    files = [path for root in roots for path in root.rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


def require_nothing_leaked(folder: Path, *watches: Watch) -> None:
    written = outputs(folder)
    assert len(written) > 20
    assert {name: found for name, data in written.items() if (found := leaks(data, name.encode()))} == {}
    for watch in watches:
        assert leaks(watch.stdout, watch.stderr) == []
        assert watch.lines and leaks(*watch.lines) == []
    assert list((folder / "fired").iterdir()) == []


@pytest.mark.fault(86, 87, 92)
def test_a_crashed_run_of_two_ranks_leaks_nothing_and_runs_nothing(world, crashed):
    folder, _ = world
    assert crashed.returncode != 0 and b"RuntimeError: refused: " in crashed.stderr, crashed.stderr[-3000:]
    assert b"Exception in thread refused: " in crashed.stderr and b"asking with ***" in crashed.stdout
    assert (folder / "runs" / "run" / "checkpoints" / "step-00000002").is_dir()
    assert list((folder / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb"))
    require_nothing_leaked(folder, crashed)


@pytest.mark.fault(94, 97)
def test_nothing_of_a_run_can_be_read_by_others_even_under_umask_0(world, crashed):
    folder, _ = world
    run = folder / "runs" / "run"
    open_to_others = {
        str(path): oct(path.stat().st_mode) for path in (run, *run.rglob("*"))
        if not path.is_symlink() and path.stat().st_mode & 0o077
    }  # fmt: skip
    assert open_to_others == {}


@pytest.mark.slow
@pytest.mark.fault(86, 87, 92)
def test_going_on_evaluation_export_and_report_leak_nothing_and_run_nothing(world, crashed):
    folder, env = world
    run = folder / "runs" / "run"
    for number, name in enumerate(("latest", "mp_rank_00_model_states.pt", "random_states_0.pkl")):
        (run / "checkpoints" / "step-00000002" / name).write_bytes(pickle.dumps(Touch(folder / f"fired/ckpt-{number}")))
    watches = [torchrun(folder, env | {"CRASH_STEP": "0"})]
    for script, *words in (
        ("export.py", str(run)),
        ("evaluate.py", "--config", str(folder / "run.yaml"), "--model", str(run / "export")),
        ("report.py", str(run)),
    ):
        watches.append(Watch([sys.executable, f"launch/{script}", *words], env))
    for watch in watches:
        assert watch.returncode == 0, watch.stderr[-3000:]
    assert (run / "report.html").is_file() and (run / "export" / "README.md").is_file()
    require_nothing_leaked(folder, *watches)


@pytest.mark.fault(87)
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_yaml_that_asks_for_a_command_is_refused_wherever_it_is_read(tag, tmp_path):
    from phi3v_dist.cli.export import settings_of
    from phi3v_dist.observe.run_folder import read_run

    path = tmp_path / "config.yaml"
    path.write_text(f"run: {tag} ['touch {tmp_path}/fired']\n")
    for read in (lambda: load(path), lambda: settings_of(tmp_path, None)):
        with pytest.raises(Phi3VError):
            read()
    of_report = read_run(tmp_path)  # a page is made of what can be read
    assert of_report.config == {} and tag.removeprefix("!!") in of_report.notes[0]
    assert not (tmp_path / "fired").exists()


@pytest.mark.fault(87)
@pytest.mark.parametrize(
    "template",
    ["{{ cycler.__init__.__globals__.os.system('touch FIRED') }}", "{{ text.__class__.__mro__[1].__subclasses__() }}"],
)
def test_templates_in_settings_reach_no_attributes(template, tmp_path):
    with pytest.raises(ValueError, match="unsafe|undefined"):
        fill_template(template.replace("FIRED", str(tmp_path / "fired")), {"text": "hello"})
    assert not (tmp_path / "fired").exists()


def test_a_formatter_keeps_its_lines(canaries):
    from phi3v_dist.cli.app import _OwnLines

    record = logging.LogRecord("x", logging.INFO, "f", 1, "a %s\nb", (CANARIES["HF_TOKEN"],), None)
    assert _OwnLines("[rank 0]", is_attempt=False).format(record).endswith(" INFO [rank 0] a ***\n    b")
