"""A virtual Slurm cluster (slurm-sim, beside this file) → verbs for tests: submit, wait, read, break and mend.

Every wait has a bound and fails with what the job wrote, squeue and sinfo; one for a state that a job can no longer
reach, because it has ended otherwise, fails at once.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import REPOSITORY, environment

TOOL = Path(__file__).parent / "slurm-sim"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
REALLY_ENDED_S = 3.0  # a job that is requeued shows NODE_FAIL or CANCELLED for a moment
POLL_S = 0.2


def why_not() -> str:
    """Why no cluster can run on this machine, with what to install; empty if one can."""
    if sys.platform != "linux" or not shutil.which("bash"):
        return f"a virtual cluster needs Linux and bash, this is {sys.platform}"
    done = subprocess.run([TOOL, "check"], capture_output=True, text=True, timeout=240)
    return "" if done.returncode == 0 else done.stderr.strip()


@dataclass(frozen=True)
class Cluster:
    """The nodes are named node1 … nodeN; `folder` is shared by all, except `folder/local`, a disk of each node.

    settings: what `slurm-sim help` calls environment, SLURM_SIM_NODE_TIMEOUT and others.
    """

    folder: Path
    num_nodes: int
    settings: dict[str, str] = field(default_factory=dict)

    # --- its life

    def up(self) -> None:
        """It goes down with this process, also if that is killed."""
        self.tool("up", str(self.num_nodes), timeout_s=120)

    def down(self) -> None:
        self.tool("down", timeout_s=240)

    def reset(self) -> None:
        """As if just started: no jobs, every node up and idle, no stand-in programs, empty node-local disks."""
        self.tool("mend")
        if self.client("squeue", "-h"):
            self.client("scancel", "--me")
            self.tool("wipe")
        self.until("no job is left", lambda: not self.client("squeue", "-h"))
        for folder in (*self.folder.glob("nodes/node*/bin"), *self.folder.glob("nodes/node*/local")):
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.until("every node is idle", lambda: set(self.nodes().values()) == {"idle"})

    # --- programs

    def environment(self, **extra: str) -> dict[str, str]:
        """Of a person who is logged in there: Slurm's programs first on PATH, nothing of a job that we run in."""
        words = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return words | {
            "PATH": f"{self.folder}/bin{os.pathsep}{words['PATH']}", "SLURM_CONF": f"{self.folder}/slurm.conf",
            "SLURM_SIM_DIR": str(self.folder), "SLURM_SIM_OWNER": str(os.getpid()),
        } | self.settings | extra  # fmt: skip

    def client(self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path = REPOSITORY, check=True) -> str:
        """What a program on the login node prints: squeue, scontrol, ..."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment(**(env or {})), cwd=cwd,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{words} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def tool(self, *words: str, timeout_s: float = 240) -> str:
        done = subprocess.run([TOOL, *words], env=self.environment(), capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise AssertionError(f"slurm-sim {' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    # --- jobs

    def sbatch(self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path = REPOSITORY) -> str:
        """Submits `words`, as typed after `sbatch`, and gives the job's id. Its output stays out of `cwd`, unless
        `words` say where."""
        (self.folder / "output").mkdir(exist_ok=True)
        output = [] if any(str(w).startswith(("--output", "-o")) for w in words) else [f"--output={self._output}"]
        return self.client("sbatch", "--parsable", *output, *words, env=env, cwd=cwd)

    @property
    def _output(self) -> Path:
        return self.folder / "output" / "%j.txt"

    def job(self, job_id: str) -> dict[str, str]:
        """Every field that `scontrol show job` prints: JobState, Reason, NodeList, Restarts, ..."""
        shown = self.client("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(.*?)(?= [A-Za-z][\w/:]*=|$)", shown.splitlines()[0]))

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def output(self, job_id: str) -> str:
        """What the batch script and its steps wrote so far."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job_id: str, *states: str, restarts: int = 0, timeout_s: float = 240) -> dict[str, str]:
        """Until the job is in one of the states (any end, if none is named), started again at least `restarts` times;
        its fields then."""
        wanted, ended_since = set(states) or ENDED, None
        end = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job["JobState"] in wanted and int(job["Restarts"]) >= restarts:
                return job
            ended_since = (ended_since or time.monotonic()) if job["JobState"] in ENDED else None
            over = ended_since is not None and time.monotonic() - ended_since > REALLY_ENDED_S
            if over or time.monotonic() > end:
                asked = f"job {job_id} to be {' or '.join(sorted(wanted))} (started again {restarts} times or more)"
                raise AssertionError(f"waited {timeout_s:g} s at most for {asked}\n{self.report(job_id)}")
            time.sleep(POLL_S)

    def until(self, what: str, holds: Callable[[], object], timeout_s: float = 240, job_id: str = "") -> None:
        """Until `holds()` is true."""
        end = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout_s:g} s in vain until {what}\n{self.report(job_id)}")
            time.sleep(POLL_S)

    def wait_for_output(self, job_id: str, text: str, times: int = 1, timeout_s: float = 240) -> str:
        """Until the job wrote `text`, `times` times in all; its whole output then."""
        holds = lambda: self.output(job_id).count(text) >= times  # noqa: E731
        self.until(f"the job wrote {text!r} {times} times", holds, timeout_s, job_id)
        return self.output(job_id)

    def report(self, job_id: str = "") -> str:
        """Everything that helps to see why a wait was in vain."""
        parts = {
            "squeue": self.client("squeue", "-o", "%i %j %T %r %M %N", check=False),
            "sinfo": self.client("sinfo", "-N", "-p", "main", "-o", "%N %T %E", check=False),
        }
        if job_id:
            parts["job"] = "\n".join(f"{key}={value}" for key, value in self.job(job_id).items())
            parts["output"] = self.output(job_id)[-8000:]
        return "\n".join(f"--- {title}\n{text}" for title, text in parts.items())

    def cancel(self, job_id: str) -> None:
        self.client("scancel", job_id)

    def hold(self, job_id: str) -> None:
        self.client("scontrol", "hold", job_id)

    def release(self, job_id: str) -> None:
        self.client("scontrol", "release", job_id)

    def signal(self, job_id: str, name: str) -> None:
        """To the batch script alone, as `--signal=B:...` does before the time limit."""
        self.client("scancel", "--batch", f"--signal={name}", job_id)

    # --- nodes

    def nodes(self) -> dict[str, str]:
        """The state of each: idle, allocated, down, drained, ... (a node that does not answer has a `*` after it)."""
        lines = self.client("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def program(self, node: str, name: str, script: str) -> Path:
        """A stand-in (for nvidia-smi, say) that comes first on PATH in jobs on this node; `script` begins with #!."""
        path = self.folder / "nodes" / node / "bin" / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def module(self, node: str, name: str, source: str) -> str:
        """A stand-in for a module of Python on the disk of this node, for jobs with the PYTHONPATH that is returned."""
        (self.folder / "nodes" / node / "local" / f"{name}.py").write_text(source)
        return f"{self.folder}/local{os.pathsep}{REPOSITORY}"

    def on(self, node: str, *words: str) -> str:
        """What a command prints on the node, outside any job."""
        return self.tool("on", node, *words)

    def kill(self, *names: str) -> None:
        """Power cut: everything on the node is gone, and nobody is told."""
        self.tool("kill", *names)

    def start(self, *names: str) -> None:
        self.tool("start", *names)

    def freeze(self, *names: str) -> None:
        """Every process of the node stands still; its kernel still answers."""
        self.tool("freeze", *names)

    def thaw(self, *names: str) -> None:
        self.tool("thaw", *names)

    def cut(self, *names: str) -> None:
        """The node's network is unplugged; what runs on it goes on."""
        self.tool("cut", *names)

    def heal(self, *names: str) -> None:
        """Plugged in, at full speed."""
        self.tool("heal", *names)

    def slow(self, name: str, mbit: int) -> None:
        """At most so many megabits per second into and out of the node."""
        self.tool("slow", name, str(mbit))

    def drain(self, name: str, reason: str) -> None:
        """As an administrator does: jobs on it go on, no new one begins."""
        self.client("scontrol", "update", f"nodename={name}", "state=drain", f"reason={reason}")
