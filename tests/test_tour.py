"""docs/tour.md, walked by somebody who has a clone, a folder of photos and no time: every command, every claim.

The quick tests look whether the commands could work (test_commands.py does so for all pages) and whether the files
that a reader is asked to write do what is said. The slow ones type everything, in order, in a copy of what a clone
holds, from `make train` to the export of a model that was trained on 300 pictures made by hand.

What is not as on the page, all of it here: `SHORTENED` words, stand-ins for the hub and for W&B on 127.0.0.1, a small
model under the real one's name, a Slurm of virtual nodes, CPUs for GPUs, and commands that say why they are not run.
"""

import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from commands import Command
from conftest import REPOSITORY, TESTS, environment
from handmade import COLOURS, THINGS, Handmade, write_folder
from slurm.cluster import Cluster
from slurm.conftest import slurm_cluster  # noqa: F401
from tour import PAGE, Chapter, Claim, File, chapters

from phi3v_dist import config
from phi3v_dist.observe.tracker import read_metrics

for folder in ("model", "observe"):  # stand-ins live beside the tests they were made for
    sys.path.append(str(TESTS / folder))

CHAPTERS = chapters()
REAL_MODEL = "microsoft/Phi-3-vision-128k-instruct"
SHORTENED = {  # in a command → words behind it, where a chapter is about the place of a run and not about its length
    "run.name=photos-node": "train.epochs=null train.steps=2 train.rows_per_step=2 eval.final_samples=4",
    "run.name=photos-slurm": "train.epochs=null train.steps=30 train.rows_per_step=2 data.row_length_tokens=1024 "
    "eval.final_samples=4",
}
NEEDS = {  # remark → what the test has for it
    "needs a network": "servers on 127.0.0.1 in the place of the hub and of W&B",
    "needs GPUs": "processes on CPUs",
    "needs Slurm": "a Slurm cluster of virtual nodes (tests/slurm)",
    "fails on purpose": "nothing: it must fail",
}
NOT_RUN = "not run by tests: "
CORES = 2
LIMIT_S = 20 * 60  # of machine time, for a newcomer to come from nothing to an export (chapters 1 and 2)


def test_the_tour_has_its_chapters_and_each_says_what_to_type() -> None:
    assert [chapter.number for chapter in CHAPTERS] == list(range(1, 11))
    contents = PAGE.read_text(encoding="utf-8").split("## 1 ")[0]
    for chapter in CHAPTERS:
        assert any(isinstance(item, Command) for item in chapter.items), chapter.title
        anchor = re.sub(r"[^a-z0-9 -]", "", f"{chapter.number} {chapter.title}".lower()).replace(" ", "-")
        assert f"(#{anchor})" in contents, f"the contents do not lead to #{anchor}"


def test_what_is_not_run_as_it_stands_says_so_in_words_known_here() -> None:
    notes = [item.note for chapter in CHAPTERS for item in chapter.items if isinstance(item, Command) and item.note]
    assert set(NEEDS) <= set(notes), "a stand-in that no command needs"
    assert all(note in NEEDS or note.startswith(NOT_RUN) for note in notes), notes
    assert sum(note.startswith(NOT_RUN) for note in notes) == 1


def test_changes_that_a_reader_is_shown_apply_and_do_what_is_said(tmp_path: Path) -> None:
    clone = copy_of_repository(tmp_path / "clone", ("phi3v_dist", "launch"))
    files = {item.name: item for item in CHAPTERS[-1].items if isinstance(item, File)}
    for name, file in files.items():
        (clone / name).write_text(file.text)
    diffs = [name for name in files if name.endswith(".diff")]
    assert len(diffs) == 2 and diffs[0] in PAGE.read_text() and f"git apply {' '.join(diffs)}" in PAGE.read_text()
    for diff in diffs:
        subprocess.run(["git", "apply", diff], cwd=clone, check=True, env=no_repository())
    write_database(clone / "things.sqlite", [("a.jpg", "red", "disc")])
    looks = (
        "from phi3v_dist.data.importers.source import READERS; from pathlib import Path;"
        "from phi3v_dist.observe.metrics import lookup;"
        "print(lookup('perf/samples_per_s_per_gpu').unit, list(READERS['.sqlite'](Path('things.sqlite'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", looks], cwd=clone, env=environment(PYTHONPATH=str(clone)), capture_output=True, text=True
    )
    assert done.stdout.strip() == "samples/s [{'file': 'a.jpg', 'colour': 'red', 'thing': 'disc'}]", done.stderr
    settings = config.load(clone / "launch/configs/mine.yaml")
    assert settings.run.name == "mine" and set(settings.eval.fields) == {"colour", "thing"}


@pytest.mark.parametrize(
    ("line", "output", "is_there"),
    [
        ("step=4/4 loss=…", "x step=12/12 loss=0.31 y", True),
        ("12 of 342 tokens trained (3.5 %)", "9 of 1,342 tokens  trained (0.7 %)", True),
        ("12 of 342 tokens trained", "twelve of 342 tokens trained", False),
        ("a … b", "a\nb", False),
        ("runs/x/report.html", "runs/xy/report.html", False),
        ("2 x picture unreadable", "no picture unreadable", False),
    ],
)
def test_a_claim_is_compared_but_for_its_numbers(line: str, output: str, is_there: bool) -> None:
    assert Claim(line).is_in(output) is is_there


def copy_of_repository(folder: Path, under: tuple[str, ...] = ()) -> Path:
    """What a clone holds, with the edits that are not committed yet, and without a repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *under],
        cwd=REPOSITORY, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def no_repository() -> dict[str, str]:
    """`git apply` looks for one upwards."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_CEILING_DIRECTORIES": "/"}


def write_database(path: Path, rows: list[tuple[str, str, str]]) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE things (file TEXT, colour TEXT, thing TEXT)")
        database.executemany("INSERT INTO things VALUES (?, ?, ?)", rows)
    database.close()


def children_cpu_s() -> float:
    """What this machine's cores have worked for commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Walker:
    """Somebody at a shell, in the clone.

    cluster: where the chapter needs one. job: the newest that was submitted, of the run named `run`. cpu_s: by chapter.
    """

    clone: Path
    env: dict[str, str]
    cluster: Cluster | None = None
    prelude: list[str] = field(default_factory=list)
    job: str = ""
    run: str = ""
    cpu_s: dict[int, float] = field(default_factory=dict)
    is_lost: bool = False

    def walk(self, chapter: Chapter) -> str:
        """Returns all that was printed. Raises AssertionError at the first command or claim that is not so."""
        output, whole, began = "", "", children_cpu_s()
        self.is_lost = True
        for item in chapter.items:
            match item:
                case File():
                    (self.clone / item.name).write_text(item.text)
                case Command():
                    output += self.type(item)
                    whole += output
                case Claim():
                    assert item.is_in(output), f"not seen: {item.line}\n--- but\n{output[-6000:]}"
        self.wait_for_job()
        self.cpu_s[chapter.number] = children_cpu_s() - began
        self.is_lost = False
        return whole

    def type(self, command: Command) -> str:
        if command.note.startswith(NOT_RUN):
            return ""
        text = command.text.replace("JOB", self.job) if self.job else command.text
        for part, words in SHORTENED.items():
            if part in text:
                text = f"{text} {words}"
                self.run = part.removeprefix("run.name=")
        env = environment(**self.env)
        if command.note == "needs Slurm" and self.cluster:
            env = self.cluster.environment(**self.env)
            if text.startswith(("tail", "touch")):
                self.cluster.until("it trains", self.has_begun, 240, self.job)
        elif not command.note:
            self.wait_for_job()
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -e", *self.prelude, text])], cwd=self.clone, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=2400,
        )  # fmt: skip
        assert (done.returncode != 0) == (command.note == "fails on purpose"), f"{command}\n{done.stdout[-6000:]}"
        if text.startswith(("source ", "export ")):
            self.prelude.append(text)
        if submitted := re.search(r"Submitted batch job (\d+)", done.stdout):
            self.job = submitted[1]
        return done.stdout

    def has_begun(self) -> bool:
        folder = self.clone / "runs" / self.run
        return (folder / "metrics.jsonl").exists() and any("train/loss" in row for row in read_metrics(folder))

    def wait_for_job(self) -> None:
        """A command that needs no Slurm is typed when the job has ended."""
        if self.job and self.cluster and self.cluster.state(self.job) != "COMPLETED":
            self.cluster.wait(self.job, "COMPLETED", timeout_s=900)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which the hub and W&B are on this machine; the hub has a small model under the real one's name."""
    from test_hub import COMMIT, REPO, Handler, Hub
    from wandb_stub import WandbStub
    from wandb_world import DUMMY_KEY

    from phi3v_dist.data.importers.sample import vocabulary_text
    from phi3v_dist.model.tiny import write_tiny

    class Renamed(Handler):
        def do_GET(self) -> None:
            self.path = self.path.replace(REAL_MODEL, REPO)
            super().do_GET()

    model = tmp_path_factory.mktemp("hub") / "model"
    write_tiny(model, vocabulary_text())
    Renamed.served = Hub({path.name: path.read_bytes() for path in model.iterdir()}, commit=COMMIT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Renamed)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with WandbStub() as stub:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(model.parent / "home"),
            "NO_PROXY": "*", "WANDB_BASE_URL": stub.url, "WANDB_API_KEY": DUMMY_KEY, "WANDB_ERROR_REPORTING": "false",
            "NETRC": str(model.parent / "no-netrc"),
        }  # fmt: skip
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Handmade:
    return write_folder(tmp_path_factory.mktemp("clone") / "photos")


@pytest.fixture(scope="module")
def walker(made: Handmade, network: dict[str, str]) -> Walker:
    clone = copy_of_repository(made.table.parents[1])
    (clone / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".ready":
            (clone / ".venv" / path.name).symlink_to(path)
    (clone / ".venv" / ".ready").touch()  # `make setup` has been: packages come from a network
    named = re.compile(rf"A ({'|'.join(COLOURS)}) ({'|'.join(THINGS)})")
    rows = [line.split(";") for line in made.table.read_text("utf-8-sig").splitlines()]
    things = [(row[0], *found.groups()) for row in rows if len(row) > 1 and (found := named.match(row[1].strip('"')))]
    write_database(clone / "photos/things.sqlite", [row for row in things if row[0].startswith(("IMG", "PXL"))])
    return Walker(clone, {"PYTHONPATH": str(clone)} | network)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=str)
@pytest.mark.supports("tour", on="2 ranks")
@pytest.mark.supports("tour", on="Slurm")
def test_a_chapter_does_what_it_says(
    walker: Walker, chapter: Chapter, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if walker.is_lost:
        pytest.skip("a chapter before it failed")
    if any(isinstance(item, Command) and item.note == "needs Slurm" for item in chapter.items):
        walker.cluster = request.getfixturevalue("slurm_cluster")
    print(walker.walk(chapter)[-20_000:])
    with capsys.disabled():
        print(f"\n{chapter}: {walker.cpu_s[chapter.number] / CORES:.0f} s of {CORES} cores")
    if chapter.number == 10:
        rows = read_metrics(walker.clone / "runs/mine")
        assert any("perf/samples_per_s_per_gpu" in row for row in rows)
        assert "perf/samples_per_s_per_gpu" in (walker.clone / "docs/metrics.md").read_text()
        assert "samples trained per second" in (walker.clone / "runs/mine/report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_newcomer_comes_to_a_trained_scored_and_exported_model_of_300_photos_in_20_minutes(
    walker: Walker, made: Handmade
) -> None:
    if not {1, 2} <= set(walker.cpu_s):
        pytest.skip("chapters 1 and 2 have not been walked")
    imported = json.loads((walker.clone / "data/photos/import.json").read_text())
    assert imported["samples"] == made.num_good and imported["failures"] == made.bad
    run = walker.clone / "runs/photos"
    scores = json.loads((run / "eval/export/scores.json").read_text())
    print(json.dumps(scores, indent=1), walker.cpu_s)
    assert scores["eval/field_em/colour"] > scores["eval/blind/field_em/colour"] + 0.2, "it looks at the pictures"
    assert (run / "export/model.safetensors").is_file() and (run / "report.html").is_file()
    assert (walker.cpu_s[1] + walker.cpu_s[2]) / CORES < LIMIT_S, "whatever else the machine does"
