"""NCCL's flight recorder → which rank did not take part in which collective operation.

What comes in: `nccl_trace_rank_N` files that PyTorch dumps when a collective hangs on GPUs. What goes out: one line.
Surprise: the files are pickles, and a pickle can run code. Only lists, dicts, texts and numbers are in them, so a
reader that knows no class and no function at all is enough; whatever asks for one is refused.

Format: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

NAME = re.compile(r"nccl_trace_rank_(\d+)")
MAX_BYTES = 256 * 2**20
COMPLETED = "completed"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def summarize(folders: list[Path]) -> list[str]:
    """Lines for people; none where there are no dumps."""
    paths = sorted(path for folder in folders for path in folder.glob("nccl_trace_rank_*") if NAME.fullmatch(path.name))
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
