"""slurm/README.md, walked through on a real Slurm; sweeps, chains, two jobs in one folder, and words that mean harm."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from launching import losses

from slurm.cluster import Cluster

PAGE = REPOSITORY / "slurm" / "README.md"
NOT_RUN = re.compile(r"\(not run by tests: (.+)\)$")
STEPS = 30
SLOW = ",".join(f"*:{phase}:*:slow" for phase in ("data", "forward", "backward", "optimizer"))  # half a second each
IN_USE, WRONG_SETTINGS = 13, 2


@pytest.fixture
def checkout(tmp_path, settings_tree) -> Path:
    """A repository that somebody has cloned, with a quickstart of this test's size and a virtual environment."""
    folder = tmp_path / "clone of $(touch fired)"
    (folder / "launch/configs").mkdir(parents=True)
    for name in ("slurm", "phi3v_dist", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    for path in (REPOSITORY / "launch").glob("*.py"):
        (folder / "launch" / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    settings_tree["run"] = {"name": "quickstart"}
    settings_tree["data"]["validation"] = []
    settings_tree["train"]["rows_per_step"] = 2
    settings_tree["data"]["row_length_tokens"] = 400
    settings_tree["checkpoint"]["every_steps"] = 20
    (folder / "launch/configs/quickstart.yaml").write_text(yaml.safe_dump(settings_tree))
    return folder


def commands_of_page() -> list[str]:
    """Every command of its `sh` blocks, as typed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@dataclass
class Page:
    """Runs the page's commands in a checkout, as a person who is logged in. nodes: what `--nodes 2` becomes."""

    cluster: Cluster
    folder: Path
    nodes: int
    left: list[str] = field(default_factory=commands_of_page)
    prelude: list[str] = field(default_factory=list)

    def run(self, what: str, job: str = "", **env: str) -> str:
        """The first command left that has `what` in it; its output, or the id of the job that it submitted."""
        command = next(line for line in self.left if what in line)
        self.left.remove(command)
        if command.startswith(("source ", "export ")):
            self.prelude.append(command)
        text = re.sub(r"\bJOB\b", job, command).replace("train.steps=1000", f"train.steps={STEPS}")
        if self.nodes == 1:
            text = text.replace("--nodes 2", "--nodes 1")
        # One node and a spare: beside the first job, on up to two nodes, the cluster of four has no room for three
        text = text.replace("--nodes 3", "--nodes 2").replace("PHI3V_NODES=2", "PHI3V_NODES=1")
        output = self.type(text, **env)
        submitted = re.search(r"Submitted batch job (\d+)", output)
        return submitted[1] if submitted else output

    def type(self, text: str, **env: str) -> str:
        script = "\n".join(["set -e", *self.prelude, text])
        done = subprocess.run(
            ["bash", "-c", script], env=self.cluster.environment(**env), cwd=self.folder,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def not_run(self) -> dict[str, str]:
        """Command → why the tests do not run it."""
        marked = {line: match[1] for line in self.left if (match := NOT_RUN.search(line))}
        self.left = [line for line in self.left if line not in marked]
        return marked


def exit_code(cluster: Cluster, job: str) -> int:
    return int(cluster.job(job)["ExitCode"].split(":")[0])


def log(folder: Path, job: str) -> str:
    path = folder / f"phi3v-{job}.out"
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.mark.slow  # minutes; what it walks through is also shown one by one in test_life_cycle and test_batch_script
@pytest.mark.timeout(900)  # measured with seven other programs a core: 230 s
@pytest.mark.fault(19, 100)
@pytest.mark.parametrize("nodes", [1, 2])
def test_each_command_of_the_page_does_what_it_says(slurm, checkout, nodes):
    page = Page(slurm, checkout, nodes)
    run = checkout / "runs/quickstart"
    step = lambda: max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0  # noqa: E731
    words = f"sbatch --nodes {nodes} slurm/train.sh launch/configs/quickstart.yaml train.steps={STEPS}"
    page.run("activate")
    page.run("SBATCH_PARTITION")

    looked = page.run("--dry-run --nodes")
    assert words in looked and "to start at" in looked and not run.exists()
    first = page.run("sbatch --nodes 2 slurm", PHI3V_FAULT=SLOW)
    slurm.until("it trains", lambda: step() >= 1, 120, first)
    assert first in page.run("squeue")
    for _ in range(2):
        assert f"Slurm job {first}" in page.run("tail -n 20 phi3v-JOB.out", first)
    assert "[attempt 1, rank 0]" in page.run("logs/*.log")
    page.run("SAVE")

    # A second job in the folder of the first, which goes on
    second = page.type(words).split()[-1]
    slurm.wait(second, "FAILED", timeout_s=120)
    assert exit_code(slurm, second) == IN_USE and slurm.job(second)["Restarts"] == "0"
    assert f"Slurm job {first}" in log(checkout, second) and "run folder in use" in log(checkout, second)
    assert slurm.state(first) == "RUNNING"

    # Move on, and end: of a job that is still looking at its nodes
    moved = page.run("PHI3V_NODES=2")
    slurm.until("it has begun", lambda: "restart 0 on" in log(checkout, moved), 60, moved)
    page.run("--signal=USR1", moved)
    slurm.wait(moved, "PENDING", restarts=1, timeout_s=240)
    page.run("scancel JOB", moved)
    slurm.wait(moved, "CANCELLED")

    chained = page.run("--dependency", first)
    assert slurm.state(chained) == "PENDING"
    stopped_at = step()
    for _ in range(2):
        page.run("STOP")
    slurm.wait(first, "COMPLETED")
    assert stopped_at <= step() < STEPS and (run / "stopped.json").exists() and not (run / "SAVE").exists()

    # While the next link of the chain trains
    assert "quickstart" in page.run("diagnose.py")
    page.run("report.py")
    assert f"JobId={first}" in page.run("scontrol show job", first)
    page.run("sinfo")
    assert "fit to train on" in page.run("doctor.py")
    assert "task 3: " in page.run("sweep.sh --dry-run")
    sweep = page.run("sbatch --array")
    page.type(f"scancel {sweep}")

    slurm.wait(chained, "COMPLETED", timeout_s=180)
    assert step() == STEPS and "continuing from" in log(checkout, chained)
    again = page.run("sbatch --nodes 2 slurm")
    slurm.wait(again, "COMPLETED")
    assert "is finished: nothing to do" in log(checkout, again) and sorted(losses(run)) == list(range(1, STEPS + 1))

    assert len(page.not_run()) == 2 and page.left == []
    assert not list(checkout.parent.rglob("fired"))


@pytest.mark.timeout(900)
@pytest.mark.fault(93)
def test_tasks_of_a_sweep_are_jobs_of_their_own_and_no_word_of_theirs_is_executed(slurm, checkout):
    harm = "$(touch fired)`touch fired`;touch fired;*'\"\\ %j $IFS&\n#SBATCH --partition=spot"
    project = '$(touch fired) `touch fired` *; " $IFS'
    lines = ["# two tasks", "", "train.steps=3 run.seed=7"]
    lines += [f"run.name=second train.steps=3 observe.wandb_project='{project}'"]
    (checkout / "sweep.txt").write_text("\n".join(lines))
    config = checkout / "launch/configs/quickstart.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["observe"]["wandb_entity"] = harm
    config.write_text(yaml.safe_dump(tree))
    root = checkout / "runs of $(touch fired);`touch fired` '\" %j *"
    words = ("slurm/sweep.sh", "launch/configs/quickstart.yaml", "sweep.txt", f"run.root={root}")
    named = f"--job-name={harm}".replace("\n", " ")
    output = checkout / "%a.out"
    array = slurm.sbatch("--array=0-2", named, f"--output={output}", *words, cwd=checkout)
    said = {n: checkout / f"{n}.out" for n in range(3)}
    for task, state in ((2, "FAILED"), (0, "COMPLETED"), (1, "COMPLETED")):
        try:
            slurm.wait(f"{array}_{task}", state, timeout_s=180)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{said[task].read_text()}") from error
    assert exit_code(slurm, f"{array}_2") == WRONG_SETTINGS
    assert "no line for task 2" in said[2].read_text() and "(sbatch --array=0-1)" in said[2].read_text()
    runs = {path.name: path for path in root.iterdir()}
    assert set(runs) == {"quickstart-0", "second"}
    assert all(sorted(losses(run)) == [1, 2, 3] for run in runs.values())
    settings = {name: yaml.safe_load((run / "config.yaml").read_text()) for name, run in runs.items()}
    assert {name: tree["run"]["seed"] for name, tree in settings.items()} == {"quickstart-0": 7, "second": 0}
    assert settings["second"]["observe"]["wandb_project"] == project
    assert settings["second"]["observe"]["wandb_entity"] == harm
    assert (runs["second"] / "logs").is_dir() and list((runs["second"] / "logs").glob("node*.log"))
    assert not list(checkout.parent.rglob("fired")) and not (REPOSITORY / "fired").exists()


def test_commands_that_are_not_run_say_why():
    marked = [line for line in commands_of_page() if "not run" in line]
    assert marked and all(NOT_RUN.search(line) for line in marked)
