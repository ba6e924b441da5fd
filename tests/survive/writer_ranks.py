"""Two processes that do nothing but save, to be killed in the middle; whatever they leave must be a clean resume.

    python writer_ranks.py kills FOLDER NUM_TRIALS SEED       SIGKILL to one rank or to both, at random moments of saves
    python writer_ranks.py boundaries FOLDER EVERY            SIGKILL before each file operation of a save (every n-th)
    python writer_ranks.py faults FOLDER rank:phase:step:action …     as PHI3V_FAULT asks, one after another
    python writer_ranks.py alone FOLDER                       one process: resume, save up to step 3, write final.json

Every trial is a new attempt that resumes from what the one before left; the steps' contents are known, so one that is
silently different is found. Prints a line of JSON for each trial. Surprise: ranks are forked, because importing torch
takes longer than a trial. Asserting is done by test_writer.py.
"""

import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi3v_dist.errors import CheckpointError, LostRankError
from phi3v_dist.parallel.partitions import TensorSpec
from phi3v_dist.survive.checkpoint import Checkpoints, Saved
from phi3v_dist.survive.manifest import FORMAT, FORMAT_VERSION, UPGRADE
from phi3v_dist.survive.rank_files import TensorReader
from phi3v_dist.survive.retention import step_of
from phi3v_dist.survive.snapshot import Snapshot
from phi3v_dist.watch import heartbeat

NUM_ELEMENTS = 3_000_001  # two blocks of a file on each of two ranks
FORK = multiprocessing.get_context("fork")


def content(step: int, num_elements: int) -> torch.Tensor:
    """What tensor `w` is at a step."""
    return torch.arange(num_elements, dtype=torch.float32).mul_(0.25).add_(step)


def made_up(step: int, rank: int = 0, world_size: int = 1, num_elements: int = NUM_ELEMENTS) -> Snapshot:
    """A rank's share of a checkpoint, without an engine."""
    share = -(-num_elements // world_size)
    piece = content(step, num_elements)[rank * share : (rank + 1) * share].clone()
    spec = TensorSpec((num_elements,), "trained", 0, {"weight": "float32"})
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "upgrade": UPGRADE, "step": step, "attempt": 1, "aliases": {},
        "world_size": world_size, "tensors": {"w": asdict(spec)},
    }  # fmt: skip
    pieces = json.dumps({"w": [rank * share, len(piece)]})
    return Snapshot(step, {"weight/w": piece}, {"pieces": pieces}, manifest.copy)


def step_and_content(path: Path | None) -> int:
    """The step a checkpoint is of, 0 without one. Raises AssertionError when its content is another step's."""
    if path is None:
        return 0
    reader = TensorReader(path)
    step = reader.manifest["step"]
    assert step == step_of(path) and torch.equal(reader.get("w"), content(step, reader.specs["w"].numel)), path
    return step


def run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    attempt: int,
    num_saves: int,
    fault: str,
    hook: Callable[[int], None] | None,
) -> None:
    """Resume, save; tell in a file what became of each save."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), PHI3V_FAULT=fault)
    meet = f"file://{folder}/meet-{attempt}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, attempt=attempt)
    checkpoints.claim()
    begun = step_and_content(checkpoints.newest())
    notes = os.open(folder / f"notes-{attempt}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tell(notes, "resumed", begun)
    dist.barrier()
    if hook:
        hook(rank)
    for step in range(begun + 1, begun + 1 + num_saves):
        try:
            checkpoints.writer.begin(made_up(step, rank, world_size), blocked_s=0.0)
            outcome = checkpoints.wait()
            tell(notes, "saved", step) if isinstance(outcome, Saved) else tell(notes, "failed", step, str(outcome))
        except (CheckpointError, LostRankError) as error:
            tell(notes, "stopped", step, f"{type(error).__name__}: {error}")
            break
    dist.destroy_process_group()


def tell(file: int, what: str, step: int, text: str = "") -> None:
    os.write(file, (json.dumps({"what": what, "step": step, "text": text}) + "\n").encode())


def told(folder: Path, attempt: int, rank: int) -> list[dict[str, Any]]:
    path = folder / f"notes-{attempt}-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(
    folder: Path, attempt: int, num_saves: int, fault: str = "", hook: Callable[[int], None] | None = None
) -> list:
    arguments = [(rank, 2, folder, attempt, num_saves, fault, hook) for rank in range(2)]
    ranks = [FORK.Process(target=run_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list, timeout_s: float) -> list[int | None]:
    """Wait for all; when one has died, the job is over for the other."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and all(process.exitcode is None for process in ranks):
        time.sleep(0.005)
    died = any(process.exitcode for process in ranks)
    for process in ranks:
        process.join(0.2 if died else max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def judge(folder: Path, attempt: int) -> dict[str, Any]:
    """What a resume finds, as this one process sees it."""
    newest = step_and_content(Checkpoints(folder / "checkpoints", keep=1).newest())
    notes = [told(folder, attempt, rank) for rank in range(2)]
    known = max((note["step"] for rank in notes for note in rank if note["what"] in ("saved", "resumed")), default=0)
    left = sorted(str(path.relative_to(folder / "checkpoints")) for path in (folder / "checkpoints").glob(".*/*"))
    return {"attempt": attempt, "newest": newest, "known to be saved": known, "left": left, "notes": notes}


def kills(folder: Path, num_trials: int, seed: int) -> None:
    draw = random.Random(seed)
    for attempt in range(1, num_trials + 1):
        ranks = start(folder, attempt, num_saves=10**6)
        # The first attempt has saved before it is killed, so that there is something to lose
        wanted = {"saved"} if attempt == 1 else {"saved", "resumed"}
        while not any(note["what"] in wanted for note in told(folder, attempt, 0)):
            time.sleep(0.002)
            assert ranks[0].exitcode is None, "a resume failed"
        time.sleep(draw.uniform(0, 0.25))
        victims = draw.choice([[0], [1], [0, 1]])
        for rank in victims:
            os.kill(ranks[rank].pid, signal.SIGKILL)
        end(ranks, timeout_s=240)
        print(json.dumps({"killed": victims} | judge(folder, attempt)), flush=True)


def boundaries(folder: Path, every: int) -> None:
    attempt = 1
    end(start(folder, attempt, num_saves=2), timeout_s=240)
    for victim in range(2):
        for number in itertools.count(1, every):
            attempt += 1
            where = folder / f"killed-{attempt}"

            def hook(rank: int, victim: int = victim, number: int = number, where: Path = where) -> None:
                if rank == victim:
                    kill_before(number, folder / "checkpoints", where)

            codes = end(start(folder, attempt, num_saves=1, hook=hook), timeout_s=240)
            at = where.read_text() if where.exists() else None
            print(json.dumps({"killed": [victim], "at": at, "codes": codes} | judge(folder, attempt)), flush=True)
            if at is None:
                break


def kill_before(number: int, folder: Path, where: Path) -> None:
    """SIGKILL to this process before its n-th file operation under a folder. Python tells of those that open, make,
    rename or remove; flushes and written blocks are told by what is wrapped here."""
    seen = itertools.count(1)

    def operation(name: str, subject: str) -> None:
        if next(seen) == number:
            where.write_text(f"{number}: {name} {subject}")
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(
            str(folder)
        ):
            operation(event, str(arguments[0]).removeprefix(str(folder)))

    fsync, beat = os.fsync, heartbeat.beat

    def counted_fsync(descriptor: int) -> None:
        operation("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(folder)))
        fsync(descriptor)

    def counted_beat(what: str = "", lane: str = heartbeat.TRAIN, **work) -> None:
        operation("block", what)
        beat(what, lane, **work)

    os.fsync, heartbeat.beat = counted_fsync, counted_beat
    sys.addaudithook(audit)


def faults(folder: Path, asked: list[str]) -> None:
    """Two saves before the fault's step, then two more; the step in the fault counts from 1 in every trial."""
    for number, fault in enumerate(asked):
        trial = folder / str(number)
        trial.mkdir()
        codes = end(start(trial, 1, num_saves=4, fault=fault), timeout_s=240)
        print(json.dumps({"fault": fault, "codes": codes} | judge(trial, 1)), flush=True)


def alone(folder: Path) -> None:
    """For an outside judge, which starts the same command again after a kill."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    checkpoints.claim()
    begun = step_and_content(checkpoints.newest())
    print(f"resumed from step {begun}", flush=True)
    for step in range(begun + 1, 4):
        checkpoints.writer.begin(made_up(step, num_elements=1000), blocked_s=0.0)
        assert isinstance(checkpoints.wait(), Saved)
    (folder / "final.json").write_text(json.dumps(content(3, 5).tolist()))


def main() -> None:
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    if what == "kills":
        kills(Path(folder), int(rest[0]), int(rest[1]))
    elif what == "boundaries":
        boundaries(Path(folder), int(rest[0]))
    elif what == "faults":
        faults(Path(folder), rest)
    else:
        alone(Path(folder))


if __name__ == "__main__":
    main()
