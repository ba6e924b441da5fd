"""The checkpoint writer alone: killed, fenced off, on full and broken disks. No engine."""

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from writer_ranks import content, made_up, step_and_content

from phi3v_dist.errors import CheckpointError, LostRankError
from phi3v_dist.survive import manifest, rank_files, space, store, tensor_file, writer
from phi3v_dist.survive.checkpoint import Checkpoints, Saved, committed
from phi3v_dist.survive.fence import FencedError
from phi3v_dist.survive.snapshot import HostMemory
from phi3v_dist.watch import faults, heartbeat
from phi3v_dist.watch.beat_file import beats_path, read_beats
from phi3v_dist.watch.endings import HOPELESS

RANKS = Path(__file__).parent / "writer_ranks.py"
SMALL = 1000  # elements
LARGE_BYTES = 20 * 2**20


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB: three checkpoints of 20 MiB, not four."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {done.stderr.strip()}")
    yield mount / "checkpoints"
    subprocess.run(["umount", mount], check=True)


def save(checkpoints: Checkpoints, step: int, num_elements: int = SMALL):
    checkpoints.claim()
    checkpoints.writer.begin(made_up(step, num_elements=num_elements), blocked_s=0.0)
    return checkpoints.wait()


def test_whoever_waits_for_a_save_or_for_its_verification_sees_how_far_it_is(folder, shown, monkeypatch):
    monkeypatch.setattr(writer, "REPORT_S", 0.01)
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, 1)
    size_bytes = (folder / "step-00000001" / "rank-00000.safetensors").stat().st_size
    assert shown[-1] == ("writing the checkpoint", 2 * size_bytes, 2 * size_bytes, "bytes"), "written and read back"
    checkpoints.newest()
    assert shown[-1] == ("verifying step-00000001", size_bytes, size_bytes, "bytes")


def names(folder: Path) -> list[str]:
    return [path.name for path in committed(folder)][::-1]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*/*")] + [path.name for path in folder.glob(".tmp-*")]


def trials(*arguments: object) -> list[dict]:
    """What writer_ranks.py prints."""
    command = [sys.executable, str(RANKS), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def require_clean(found: list[dict]) -> None:
    """Nothing that a rank knew to be saved is lost. That contents are right, the script has looked at."""
    for trial in found:
        assert trial["newest"] >= trial["known to be saved"], trial
    print(f"{len(found)} trials, {sum(bool(trial['left']) for trial in found)} with something left to sweep")


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    "num_trials, seed", [(8, 1), pytest.param(200, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_killed_at_random_moments_of_a_save_every_resume_is_clean(tmp_path, num_trials, seed):
    print(f"seed {seed}")
    found = trials("kills", tmp_path / "run", num_trials, seed)
    assert len(found) == num_trials
    require_clean(found)
    assert found[-1]["newest"] > 0


@pytest.mark.fault(5)
@pytest.mark.fault(43)
@pytest.mark.fault(45)
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_before_any_file_operation_of_a_save_every_resume_is_clean(tmp_path, every):
    found = trials("boundaries", tmp_path / "run", every)
    require_clean(found)
    points = [trial["at"] for trial in found if trial["at"]]
    for operation in ("open", "block", "os.fsync", "os.rename")[: 4 if every == 1 else 1]:
        assert any(f": {operation} " in point for point in points), operation
    assert len(points) >= 40 // every and [trial["at"] for trial in found].count(None) == 2


@pytest.mark.slow
@pytest.mark.fault(45)
@pytest.mark.timeout(1800)
def test_an_outside_judge_finds_every_kill_point_clean(tmp_path):
    judge = shutil.which("ckpt-chaos")
    if judge is None:
        pytest.skip("ckpt-chaos (PyPI) is not on PATH")
    command = [
        judge, "run", "--step-regex", r"resumed from step (\d+)", "--result-file", "{out}/final.json",
        "--checkpoint-glob", "{out}/checkpoints/step-*", "--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK",
        "--", sys.executable, str(RANKS), "alone", "{out}",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(RANKS.parents[2])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def injected(tmp_path_factory) -> dict[str, dict]:
    asked = [
        "1:write:3:kill9",
        "0:commit:3:kill9",
        "0:prune:3:kill9",
        "1:write:3:enospc",
        "0:commit:3:eio",
        "1:write:2+:enospc",
        "1:write:3:raise",
    ]
    return {trial["fault"]: trial for trial in trials("faults", tmp_path_factory.mktemp("injected"), *asked)}


@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.parametrize("fault", ["1:write:3:kill9", "0:commit:3:kill9"])
def test_a_rank_killed_while_writing_or_before_the_commit_leaves_the_checkpoint_before(injected, fault):
    trial = injected[fault]
    assert trial["newest"] == 2 and -9 in trial["codes"]
    survivor = next(rank for rank in trial["notes"] if rank[-1]["what"] == "stopped")
    assert survivor[-1]["text"].startswith("LostRankError: ") and "lost another rank" in survivor[-1]["text"]
    assert LostRankError.exit_code not in HOPELESS, "the run is started again"


@pytest.mark.fault(43)
def test_a_rank_killed_before_it_prunes_leaves_the_newest_and_what_was_before(injected):
    assert injected["0:prune:3:kill9"]["newest"] == 3


@pytest.mark.fault(33)
@pytest.mark.parametrize("fault, who", [("1:write:3:enospc", "rank 1"), ("0:commit:3:eio", "rank 0")])
def test_a_disk_that_fails_one_rank_fails_the_save_on_all_and_training_goes_on(injected, fault, who):
    trial = injected[fault]
    assert trial["newest"] == 4 and trial["codes"] == [0, 0] and not trial["left"]
    for rank in trial["notes"]:
        assert [note["what"] for note in rank] == ["resumed", "saved", "saved", "failed", "saved"]
        assert f"{who} on " in rank[3]["text"] and "cannot save step 3" in rank[3]["text"]
    if "enospc" in fault:
        assert all(
            text in rank[3]["text"] for text in ("need ", "have ", "rank-00001.safetensors") for rank in trial["notes"]
        )


@pytest.mark.fault(32)
def test_the_third_failure_in_a_row_stops_the_run_and_the_last_good_checkpoint_is_valid(injected):
    trial = injected["1:write:2+:enospc"]
    assert trial["newest"] == 1 and not trial["left"]
    for rank in trial["notes"]:
        assert [note["what"] for note in rank] == ["resumed", "saved", "failed", "failed", "stopped"]
        assert rank[-1]["text"].startswith("CheckpointError: 3 saves in a row failed")


@pytest.mark.fault(36)
@pytest.mark.fault(37)
@pytest.mark.fault(38)
@pytest.mark.parametrize("damage", ["truncated", "zero length", "missing"])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_broken_file_is_named_and_the_checkpoint_before_is_used(folder, caplog, damage, file):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    path = folder / "step-00000002" / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    with caplog.at_level(logging.WARNING):
        assert step_and_content(Checkpoints(folder, keep=3).newest()) == 1
    assert "step-00000002" in caplog.text and file in caplog.text


@pytest.mark.fault(39)
def test_of_sixty_random_bit_flips_all_are_found_and_the_checkpoint_before_is_used(folder):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    seed = 39
    print(f"seed {seed}")
    draw, found = random.Random(seed), 0
    for _ in range(60):
        path = draw.choice(sorted((folder / "step-00000002").iterdir()))
        original = path.read_bytes()
        position, bit = draw.randrange(len(original)), draw.randrange(8)
        flipped = bytearray(original)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        found += step_and_content(Checkpoints(folder, keep=3).newest()) == 1
        path.write_bytes(original)
    assert found == 60
    assert step_and_content(Checkpoints(folder, keep=3).newest()) == 2


@pytest.mark.fault(40)
@pytest.mark.fault(41)
def test_when_every_checkpoint_is_damaged_the_run_stops_and_lists_them_instead_of_starting_again(folder):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
        (folder / f"step-{step:08d}" / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, keep=3).newest()
    assert len(caught.value.problems) == 3 and "move the folder away to start at step 0" in caught.value.problems[0]
    assert (
        "step-00000002 is damaged" in caught.value.problems[1]
        and "step-00000001 is damaged" in caught.value.problems[2]
    )
    assert Checkpoints(folder / "never", keep=3).newest() is None


@pytest.mark.fault(30)
def test_values_that_are_not_finite_are_never_committed(folder):
    checkpoints = Checkpoints(folder, keep=3)
    save(checkpoints, 1)
    bad = made_up(2, num_elements=SMALL)
    bad.tensors["weight/w"][[3, 5]] = torch.tensor([torch.nan, torch.inf])
    checkpoints.writer.begin(bad, blocked_s=0.0)
    outcome = checkpoints.wait()
    assert isinstance(outcome, CheckpointError) and "2 of 1000 values of weight/w are not finite" in str(outcome)
    assert "rank 0 on " in str(outcome) and names(folder) == ["step-00000001"] and not leftovers(folder)
    large = made_up(3, num_elements=SMALL)
    large.tensors["weight/w"].fill_(3e38)  # the sum of finite values need not be finite
    checkpoints.writer.begin(large, blocked_s=0.0)
    assert isinstance(checkpoints.wait(), Saved)


@pytest.mark.fault(23)
def test_an_older_attempt_cannot_commit_or_prune_once_a_newer_one_has_started(folder):
    zombie = Checkpoints(folder, keep=1, attempt=1, write_mb_per_s=0.02)
    for step in (1, 2):
        assert isinstance(save(zombie, step), Saved)
    zombie.writer.begin(made_up(3, num_elements=SMALL), blocked_s=0.0)  # held up by its rate
    while not list(folder.glob(".attempt-0001/step-00000003/rank-*")):
        time.sleep(0.001)
    newer = Checkpoints(folder, keep=2, attempt=2)
    assert isinstance(save(newer, 9), Saved)
    with pytest.raises(FencedError, match="attempt 2 of this run has taken over"):
        zombie.wait()
    with pytest.raises(FencedError, match="attempt 2"):
        save(zombie, 4)
    zombie.writer._prune(folder / "step-00000002", 2)
    assert names(folder) == ["step-00000002", "step-00000009"] and not leftovers(folder)
    with pytest.raises(FencedError, match="attempt 2"):
        Checkpoints(folder, keep=1, attempt=1).claim()


@pytest.mark.fault(34)
def test_a_checkpoint_that_does_not_fit_is_refused_before_a_byte_is_written(small_disk, monkeypatch, caplog):
    checkpoints = Checkpoints(small_disk, keep=5)
    with caplog.at_level(logging.WARNING):
        assert isinstance(save(checkpoints, 1, LARGE_BYTES // 4), Saved)
        assert not caplog.text
        assert isinstance(save(checkpoints, 2, LARGE_BYTES // 4), Saved)
    assert "has room for 1 more checkpoint of 21 MB after this one" in caplog.text
    save(checkpoints, 3, LARGE_BYTES // 4)
    monkeypatch.setattr(writer, "write_rank_file", lambda *_: pytest.fail("a byte would be written"))
    outcome = save(checkpoints, 4, LARGE_BYTES // 4)
    assert f"no space on {small_disk}: need 21 MB, have " in str(outcome) and "`checkpoint.keep`" in str(outcome)
    assert names(small_disk) == [f"step-0000000{step}" for step in (1, 2, 3)] and not leftovers(small_disk)


@pytest.mark.fault(32)
def test_a_disk_that_fills_up_during_a_save_is_named_with_what_is_needed_and_the_part_removed(small_disk, monkeypatch):
    checkpoints = Checkpoints(small_disk, keep=5)
    for step in (1, 2, 3):
        save(checkpoints, step, LARGE_BYTES // 4)
    monkeypatch.setattr(space, "shortage", lambda rooms: None)  # others take the space after it was asked for
    outcome = save(checkpoints, 4, LARGE_BYTES // 4)
    assert isinstance(outcome, CheckpointError) and "No space left on device" in str(outcome)
    assert "need 21 MB, have " in str(outcome) and "rank-00000.safetensors" in str(outcome)
    assert step_and_content(Checkpoints(small_disk, keep=5).newest()) == 3 and not leftovers(small_disk)


@pytest.mark.fault(35)
def test_a_file_system_that_cannot_be_written_to_is_named_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk.parent], check=True)
    with pytest.raises(CheckpointError, match="user root cannot write to .*checkpoints: .*Read-only file system"):
        Checkpoints(small_disk, keep=1).claim()


@pytest.mark.fault(43)
def test_pruning_keeps_what_is_pinned_and_counts_no_damaged_checkpoint(folder):
    pinned = folder / "step-00000001"
    checkpoints = Checkpoints(folder, keep=2, keep_also=lambda: [pinned])
    for step in (1, 2, 3):
        save(checkpoints, step)
    (folder / "step-00000003" / "rank-00000.safetensors").write_bytes(b"")
    save(checkpoints, 4)
    assert names(folder) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    save(checkpoints, 5)
    assert names(folder) == ["step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.fault(44)
def test_a_slow_disk_holds_up_the_writer_alone_and_who_waits_is_not_held_to_its_rate(folder):
    checkpoints = Checkpoints(folder, keep=1, write_mb_per_s=0.0001)
    checkpoints.claim()
    checkpoints.writer.begin(made_up(1, num_elements=SMALL), blocked_s=0.0)  # at this rate it takes a minute
    time.sleep(0.3)
    assert checkpoints.busy and checkpoints.poll() is None
    outcome = checkpoints.wait(timeout_s=20.0)
    assert isinstance(outcome, Saved) and not checkpoints.busy and checkpoints.poll() is None
    assert (outcome.step, outcome.path, outcome.write_s >= 0.3) == (1, folder / "step-00000001", True)


@pytest.mark.fault(44)
def test_a_disk_that_flushes_slowly_is_heard_of_between_blocks_and_has_the_first_bound_at_the_end(
    folder, tmp_path, monkeypatch
):
    """Between two signs of life no more is flushed than FLUSH_BYTES; the last flush is in a phase without median."""
    bounds_s, num_heard = {"fdatasync": [], "fsync": []}, []

    def lane():
        return read_beats(beats_path(tmp_path / "beats", 0)).lanes[heartbeat.SAVE]

    def watched(name):
        flush = getattr(os, name)

        def flushed(file):
            flush(file)
            if "rank-" in os.readlink(f"/proc/self/fd/{file}"):
                bounds_s[name].append((lane().phase, lane().bound_s))
                num_heard.append(lane().beats)

        return flushed

    monkeypatch.setattr(rank_files, "FLUSH_BYTES", tensor_file.BLOCK_BYTES)
    for name in bounds_s:
        monkeypatch.setattr(os, name, watched(name))
    (tmp_path / "beats").mkdir()
    heartbeat.open(tmp_path / "beats", 0, "node-a", heartbeat.Bounds(hang_s=1.0, hang_factor=10.0, first_s=600.0))
    try:
        assert isinstance(save(Checkpoints(folder, keep=1), 1, LARGE_BYTES // 4), Saved)
    finally:
        heartbeat.close(heartbeat.DONE)
    assert [phase for phase, _ in bounds_s["fdatasync"]] == ["write", "write"], "20 MiB in blocks of 8"
    assert num_heard == sorted(set(num_heard)), "a sign of life between any two flushes"
    assert bounds_s["fsync"] == [("flush", 600.0)]


@pytest.mark.fault(43)
@pytest.mark.parametrize("stranger", ["a plain file", "a dangling link", "one removed meanwhile"])
def test_what_people_do_to_older_checkpoints_costs_no_save(folder, monkeypatch, caplog, stranger):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, 2)
    older = folder / "step-00000001"
    if stranger == "a plain file":
        older.write_text("notes")
    elif stranger == "a dangling link":
        older.symlink_to(folder / "nowhere")
    else:
        monkeypatch.setattr(store, "superfluous", lambda *_: [older])
    with caplog.at_level(logging.WARNING):
        assert isinstance(save(checkpoints, 3), Saved)
    assert "older checkpoints than" in caplog.text and "cannot be listed" in caplog.text


def test_a_mistake_on_one_rank_ends_the_save_on_all_and_nobody_waits(injected):
    trial = injected["1:write:3:raise"]
    assert trial["newest"] == 2 and trial["codes"][1] == 1
    assert [note["what"] for note in trial["notes"][0]][:4] == ["resumed", "saved", "saved", "failed"]
    assert "rank 1 on " in trial["notes"][0][3]["text"] and "injected into phase write" in trial["notes"][0][3]["text"]


@pytest.mark.fault(44)
def test_who_asks_for_the_newest_checkpoint_waits_for_the_save_in_flight(folder):
    checkpoints = Checkpoints(folder, keep=2, write_mb_per_s=0.0001)
    checkpoints.claim()
    checkpoints.writer.begin(made_up(1, num_elements=SMALL), blocked_s=0.0)  # at this rate it takes a minute
    assert step_and_content(checkpoints.newest()) == 1 and not checkpoints.busy
    assert isinstance(checkpoints.poll(), Saved), "the outcome is still told"


@pytest.mark.fault(23)
@pytest.mark.parametrize("asleep_before", ["the first rename", "the second rename", "the commit"])
def test_a_zombie_that_slept_while_it_replaced_a_checkpoint_takes_nothing_from_the_newer_attempt(
    folder, monkeypatch, asleep_before
):
    zombie = Checkpoints(folder, keep=3, attempt=1)
    for step in (1, 2):
        save(zombie, step)
    newer, chosen = Checkpoints(folder, keep=3, attempt=2), []
    renames, rename = {"the first rename": 1, "the second rename": 2, "the commit": 3}, os.rename

    def sleepy(source, target):
        if Path(target).name.removeprefix("held-").startswith("step-00000002"):
            renames[asleep_before] -= 1
        if not renames[asleep_before] and not chosen:
            chosen.append(None)  # what the newer one does is not the zombie's
            newer.claim()
            chosen[0] = newer.newest()
        rename(source, target)

    monkeypatch.setattr(os, "rename", sleepy)
    monkeypatch.setattr(Path, "rename", sleepy)
    with pytest.raises(FencedError):
        save(zombie, 2)
    assert step_and_content(chosen[0]) == 2 and step_and_content(newer.newest()) == 2
    assert names(folder)[-1] == chosen[0].name and not leftovers(folder)


@pytest.mark.fault(39)
@pytest.mark.parametrize("num_errors, found", [(2, 2), (3, 1)])
def test_a_file_system_that_answers_with_an_error_is_asked_again_before_a_checkpoint_counts_as_damaged(
    folder, monkeypatch, num_errors, found
):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    left, hash_file = [num_errors], manifest.hash_file

    def failing(path, on_block):
        if path.parent.name == "step-00000002" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return hash_file(path, on_block)

    monkeypatch.setattr(manifest, "hash_file", failing)
    monkeypatch.setattr(manifest, "BETWEEN_LOOKS_S", 0.0)
    assert step_and_content(Checkpoints(folder, keep=3).newest()) == found and not left[0]


@pytest.mark.fault(39)
def test_a_checkpoint_that_was_passed_over_is_not_found_again_when_it_can_be_read_later(folder, caplog):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, 1)
    shutil.copytree(folder / "step-00000001", folder / "damaged-step-00000001")
    older = shutil.copytree(folder / "step-00000001", folder / "kept")
    save(checkpoints, 2)
    older.rename(folder / "step-00000001")
    file = folder / "step-00000002" / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(b"")
    reader = Checkpoints(folder, keep=1, attempt=2)
    assert step_and_content(reader.newest()) == 1
    assert file.exists(), "who only reads renames nothing"
    reader.claim()
    with caplog.at_level(logging.WARNING):
        reader._set_aside_before(1)
    assert "is kept as damaged-step-00000002" in caplog.text
    (folder / "damaged-step-00000002" / file.name).write_bytes(content)
    assert step_and_content(Checkpoints(folder, keep=1).newest()) == 1
    save(reader, 2)
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["damaged-step-00000002", "step-00000002"]


def test_an_exception_that_is_no_failed_save_reaches_the_thread_that_asks(folder, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "0:write:1:raise")
    with pytest.raises(RuntimeError, match="injected into phase write"):
        save(Checkpoints(folder, keep=1), 1)


@pytest.mark.fault(95)
def test_planted_links_are_not_followed(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / ".attempt-0001").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=".attempt-0001 is a link"):
        Checkpoints(folder, keep=1).claim()
    (folder / ".attempt-0001").unlink()
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        save(checkpoints, step)
    moved = (folder / "step-00000002").rename(elsewhere / "step")
    (folder / "step-00000002").symlink_to(moved)
    assert step_and_content(Checkpoints(folder, keep=2).newest()) == 1
    (folder / ".attempt-0001" / "step-00000003").symlink_to(elsewhere)
    assert isinstance(save(checkpoints, 3), Saved) and [path.name for path in elsewhere.iterdir()] == ["step"]


@pytest.mark.fault(94)
def test_the_umask_decides_who_may_read_a_checkpoint(folder):
    before = os.umask(0o077)
    try:
        save(Checkpoints(folder, keep=1), 1)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert set(modes.values()) == {0o700, 0o600} and all(
        mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()
    )


def test_host_memory_is_taken_once_and_holds_what_the_tensors_were():
    memory = HostMemory()
    tensors = {"a": content(1, 1000), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}
    memory.reserve(tensors)
    first = memory.copy(tensors)
    tensors["a"] += 1
    assert torch.equal(first["a"], content(1, 1000)) and first["b"].dtype == torch.bfloat16
    again = memory.copy(tensors)
    assert again["a"].data_ptr() == first["a"].data_ptr() and torch.equal(again["a"], content(1, 1000) + 1)
