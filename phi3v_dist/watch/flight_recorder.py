"""NCCL's flight recorder → which rank did not take part in which collective operation.

What comes in: files that PyTorch dumps when a collective hangs on GPUs, by itself after its own long timeout or when it
is asked: it makes a named pipe per rank, and something written to it is the question. What goes out: one line.
Surprise: the files are pickles, and a pickle can run code. Only lists, dicts, texts and numbers are in them, so a
reader that knows no class and no function at all is enough; whatever asks for one is refused.

The run's environment names the files: TORCH_NCCL_DEBUG_INFO_PIPE_FILE=RUN/nccl/pipe_ and
TORCH_NCCL_DEBUG_INFO_TEMP_FILE=RUN/nccl/trace_, to which PyTorch adds the rank (and `.pipe`). It looks at the pipe once
a second where TORCH_NCCL_DUMP_ON_TIMEOUT is set, else only every few minutes.

Format: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

import contextlib
import os
import pickle
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

NAME = re.compile(r"(?:nccl_trace_rank|trace)_(\d+)")
FOLDER, PIPE, TRACE, KEPT = "nccl", "pipe_", "trace_", "nccl_trace_rank_"
DUMPED_S = 10.0  # for PyTorch to look at its pipe, and to write, on a machine that has far too much to do
QUIET_S = 0.5  # nothing more for so long: the file is whole
OLD_BUFFER_SIZE = "TORCH_NCCL_TRACE_BUFFER_SIZE"  # deprecated: PyTorch still reads it, and warns on every rank
REMEMBERED = 2000  # operations of each rank
MAX_BYTES = 256 * 2**20
COMPLETED = "completed"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def record(run_folder: Path) -> None:
    """Have NCCL remember its last operations, and dump them on demand; before the process group is made."""
    with contextlib.suppress(OSError):  # a folder that cannot be written is named a moment later
        (run_folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if OLD_BUFFER_SIZE not in os.environ:  # a user's own value; PyTorch would prefer ours
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(REMEMBERED))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(run_folder.resolve() / FOLDER / PIPE))
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(run_folder.resolve() / FOLDER / TRACE))


def ask(attempt_folder: Path, ranks: Sequence[int]) -> None:
    """Have ranks of this node that are about to be killed dump what they recorded, into their attempt's folder.

    Takes 10 s at most, and no time for ranks without NCCL.
    """
    folder = attempt_folder.parent.parent / FOLDER
    forget(attempt_folder, ranks)
    asked = [rank for rank in ranks if _write(folder / f"{PIPE}{rank}.pipe")]
    deadline_s, sizes, since_s = time.monotonic() + DUMPED_S, [-1] * len(asked), time.monotonic()
    while asked and (now_s := time.monotonic()) < deadline_s:
        found = [_size(folder / f"{TRACE}{rank}") for rank in asked]
        sizes, since_s = found, since_s if found == sizes else now_s
        if min(sizes) > 0 and now_s - since_s > QUIET_S:
            break
        time.sleep(QUIET_S / 4)
    for rank in asked:
        with contextlib.suppress(OSError):  # none came: a process that is stopped does not answer
            (folder / f"{TRACE}{rank}").rename(attempt_folder / f"{KEPT}{rank}")


def forget(attempt_folder: Path, ranks: Sequence[int]) -> None:
    """Remove what these ranks dumped in an earlier attempt: it would be taken for news."""
    for rank in ranks:
        with contextlib.suppress(OSError):
            (attempt_folder.parent.parent / FOLDER / f"{TRACE}{rank}").unlink(missing_ok=True)


def _write(pipe: Path) -> bool:
    """Whether somebody listens at this pipe."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return pipe.is_fifo() and os.write(descriptor, b"1") > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def summarize(folders: list[Path]) -> list[str]:
    """Lines for people; none where there are no dumps."""
    paths = sorted(path for folder in folders for path in folder.glob("*trace_*") if NAME.fullmatch(path.name))
    lines, pending = [], {}
    for path in paths:
        try:
            with path.open("rb") as file:
                pending[int(path.name.rpartition("_")[2])] = _first_pending(_load(file, path))
        except (OSError, pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError, AttributeError) as error:
            lines.append(f"{path} was not read: {error}")
    if not pending:
        return lines
    numbers = {rank: number for rank, (number, _) in pending.items()}
    behind = min(numbers.values())
    if len(set(numbers.values())) == 1:
        name = next(iter(pending.values()))[1]
        return [*lines, f"NCCL: all ranks were in the same operation, number {behind} ({name}): see the network"]
    late = [str(rank) for rank, number in numbers.items() if number == behind]
    name = pending[int(late[0])][1]
    return [*lines, f"NCCL: rank {', '.join(late)} had not gone past operation {behind} ({name}), others had"]


def _load(file: BinaryIO, path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("it is too large")
    return _PlainUnpickler(file).load()  # type: ignore[no-any-return]


def _first_pending(tree: dict[str, Any]) -> tuple[int, str]:
    """Number and name of the first operation that had not come to its end, else of the last one."""
    entries = sorted(tree["entries"], key=lambda entry: int(entry["collective_seq_id"]))
    open_ones = [entry for entry in entries if entry["state"] != COMPLETED]
    entry = (open_ones or entries[-1:])[0]
    return int(entry["collective_seq_id"]), str(entry["profiling_name"])
