"""A run submitted with slurm/train.sh on the virtual cluster → how far it is, what it left, how long it stood still.

What comes in: a cluster, a YAML file, overrides. What goes out: a `Job`, and after a fault its `Recovery`. Surprise:
all nodes of the virtual cluster share one clock, so here, and only here, times of several hosts may be subtracted.
"""

import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from conftest import REPOSITORY
from launching import losses

from phi3v_dist import config
from phi3v_dist.cluster import starts
from phi3v_dist.data import audit, audit_report
from phi3v_dist.data.ledger import LEDGER_NAME, LedgerReader
from phi3v_dist.observe.metrics import ATTEMPT, STEP
from phi3v_dist.observe.tracker import RECORD_NAME
from phi3v_dist.run import Data, plan
from phi3v_dist.survive.checkpoint import read_tensors
from phi3v_dist.watch.node_report import read_reports
from slurm.cluster import Cluster

STEPS, EVERY_STEPS = 24, 6  # of each run here, and between its checkpoints
SETTINGS = (
    f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY_STEPS}", "data.validation=[]", "watch.hang_s=10",
)  # fmt: skip
SLOW = [f"{rank}:{phase}:*:slow" for phase in ("forward", "optimizer", "data", "backward") for rank in (0, 1)]
TRAIN = REPOSITORY / "slurm" / "train.sh"
IMPORTS = {  # program → what it imports before it does anything
    "launch/job.py": "phi3v_dist.cli.job",
    "launch/doctor.py": "phi3v_dist.cluster.preflight, phi3v_dist.config, phi3v_dist.parallel.topology",
}
TIMED_IMPORT = "import time, psutil, {}; print(time.time() - psutil.Process().create_time())"


@dataclass(frozen=True)
class Job:
    """One that trains: its number, and its run folder."""

    cluster: Cluster
    id: str
    run: Path

    def rows(self) -> list[dict[str, float]]:
        """Of metrics.jsonl, one for each step of each attempt that came to it; without a line in the making."""
        path = self.run / RECORD_NAME
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [row for row in map(json.loads, lines) if "train/loss" in row]

    def until_step(self, step: int, attempt: int = 1, timeout_s: float = 280) -> None:
        """Until this attempt, or a later one, has come so far."""
        reached = lambda: any(row[STEP] >= step and row[ATTEMPT] >= attempt for row in self.rows())  # noqa: E731
        self.cluster.until(f"attempt {attempt} is at step {step}", reached, timeout_s, self.id)

    def until_finished(self, timeout_s: float = 800) -> None:
        self.cluster.wait(self.id, "COMPLETED", timeout_s=timeout_s)
        assert (self.run / "summary.json").exists(), self.cluster.report(self.id)

    def owner(self, attempt: int) -> dict:
        return json.loads((self.run / f"attempts/{attempt:04d}/owner.json").read_text())

    def batch_host(self) -> str:
        return self.cluster.job(self.id)["BatchHost"]

    def rank_on(self, host: str) -> str:
        """Process id, within its node, of the rank there in the newest attempt."""
        folder = max((self.run / "attempts").glob("[0-9]*"))
        (report,) = [report for report in read_reports(folder) if report.host == host]
        return str(report.ranks[0].pid)

    def checkpoints(self) -> dict[str, int]:
        """Every file of every checkpoint, and when it was last written to."""
        files = (path for path in (self.run / "checkpoints").rglob("*") if path.is_file())
        return {str(path.relative_to(self.run)): path.stat().st_mtime_ns for path in files}


def submit(cluster: Cluster, config: Path, root: Path, name: str, *overrides: str, options=(), slow=1, **env) -> Job:
    """Three nodes, unless `options` of sbatch say otherwise. slow: half seconds that each step takes longer, so that a
    fault finds the run where it was to be found."""
    options = options or ("--nodes=3",)
    words = {"PHI3V_VENV": sys.prefix, "PHI3V_FAULT": ",".join(SLOW[:slow])} | env
    job_id = cluster.sbatch(*options, TRAIN, config, f"run.name={name}", *SETTINGS, *overrides, env=words)
    return Job(cluster, job_id, root / name)


def assert_same_weights(run: Path, reference: Path) -> None:
    """Final weights and moments, to the bit."""
    ours, theirs = (read_tensors(folder / f"checkpoints/step-{STEPS:08d}") for folder in (run, reference))
    assert ours.names == theirs.names
    for name, spec in ours.specs.items():
        for state in spec.dtypes:
            assert torch.equal(ours.stored(name, state), theirs.stored(name, state)), (name, state)


def assert_same_run(run: Path, reference: Path) -> None:
    """Losses, rows of the data, final weights and moments: to the bit."""
    assert losses(run) == losses(reference)
    assert ledger(run) == ledger(reference)
    assert_same_weights(run, reference)


def ledger(run: Path) -> list[tuple]:
    return [(record.step, record.rows, dict(record.not_trained)) for record, _ in LedgerReader(run / LEDGER_NAME)]


def assert_each_sample_once(run: Path) -> None:
    """As `launch/prepare.py audit` finds it."""
    settings = config.of_run(run)
    data = Data.open(settings.data.train, settings)
    head, listed = audit_report.newest_head(run), audit_report.listed_in(run)
    reader = LedgerReader(run / LEDGER_NAME)
    found = audit.audit(reader, data.table, data.lengths, plan(settings, data), head, listed)
    assert not found.problems, audit_report.lines_of(found)


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault to the end of the first step after it, in four parts, and the steps that were lost.

    noticed_s: until the ranks' watchers have said what it is. slurm_s: Slurm's own, from the end of the job's life to
    the next one. imports_s: of Python: of training until its ranks have met, of other programs measured apart on as
    many nodes. ours_s: all the rest.
    """

    noticed_s: float
    slurm_s: float
    imports_s: float
    ours_s: float
    steps_lost: int
    nodes: int
    how: str

    @property
    def total_s(self) -> float:
        return self.noticed_s + self.slurm_s + self.imports_s + self.ours_s


def recovery(job: Job, fault_s: float, imports_s: dict[str, float]) -> Recovery:
    """What happened between `fault_s` (unix) and the next step, of a run that has trained on since."""
    rows = job.rows()
    before = max((row for row in rows if row["time"] <= fault_s), key=lambda row: row["time"])[ATTEMPT]
    again = min((row for row in rows if row[ATTEMPT] > before), key=lambda row: row["time"])
    old, new = job.owner(int(before)), job.owner(int(again[ATTEMPT]))
    lost = max(row[STEP] for row in rows if row[ATTEMPT] == before) - again[STEP] + 1
    ended_s = end_of_start(job, old)
    seen_s = verdict_s(job, int(before))
    came_back = new["restart"] > old["restart"]
    life_s = datetime.fromisoformat(job.cluster.job(job.id)["StartTime"]).timestamp() if came_back else None
    if ended_s and life_s and ended_s > life_s:
        ended_s = None  # said by a batch script that was cut off from Slurm, which did not wait for it
    noticed_s = max(0.0, min(seen_s, ended_s) - fault_s) if seen_s and ended_s else 0.0
    slurm_s = life_s - (ended_s or fault_s) if life_s else 0.0
    num_starts = sum(fault_s < start.unix_s < again["time"] for start in starts.read(job.run))
    asked = 1 + num_starts + (ended_s is not None)  # begin or judge, nodes
    imported_s = asked * imports_s["launch/job.py"] + num_starts * imports_s["launch/doctor.py"]
    imported_s += sum(job.owner(attempt)["start_s"] for attempt in range(int(before) + 1, int(again[ATTEMPT]) + 1))
    ours_s = again["time"] - fault_s - noticed_s - slurm_s - imported_s
    how = "requeued" if came_back else "in place"
    return Recovery(noticed_s, slurm_s, imported_s, ours_s, int(lost), len(new["hosts"]), how)


def end_of_start(job: Job, owner: dict) -> float | None:
    """Unix time at which the batch script judged the start that made an attempt; None if nobody was left to."""
    for line in (job.run / starts.STARTS_NAME).read_text().splitlines():
        kind, tree = next(iter(json.loads(line).items()))
        if kind == "end" and (tree["restart"], tree["number"]) == (owner["restart"], owner["start"]):
            return float(tree["unix_s"])
    return None


def verdict_s(job: Job, attempt: int) -> float | None:
    """Unix time at which a watcher wrote why the attempt ended; None after a clean stop."""
    files = (job.run / f"attempts/{attempt:04d}").glob("node-*.json")
    return min((path.stat().st_mtime for path in files if json.loads(path.read_text())["verdict"]), default=None)


def time_imports(cluster: Cluster) -> dict[str, float]:
    """Program → seconds from its start until it has imported what it needs, on three nodes at once, the slowest."""
    found = {}
    for program, modules in IMPORTS.items():
        nodes = "1" if program == "launch/job.py" else "3"
        words = ("srun", f"--nodes={nodes}", "--ntasks-per-node=1", sys.executable, "-c", TIMED_IMPORT.format(modules))
        found[program] = max(float(line) for line in cluster.client(*words).splitlines() if line[:1].isdecimal())
    return found


def now_s() -> float:
    return time.time()
