"""The slow trials of the life cycle → docs/slurm-recovery.md: seconds from a fault to training again, and whose.

    python tests/slurm/recovery_table.py

What comes in: nothing; the trials are run anew (half an hour). Surprise: a trial that fails leaves no row, so the page
holds only faults after which the run ended as if nothing had happened.
"""

import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "slurm-recovery.md"
VARIABLE = "PHI3V_RECOVERY_ROWS"  # a file to which each trial adds its row
BOUND_S = 15.0
HEAD = """# How long a job stands still

Seconds from a fault until the first step after it is done, on a real Slurm of virtual nodes (tests/slurm), three ranks
on three nodes. Written by `python tests/slurm/recovery_table.py`; do not edit. Measured on {date}: {machine}.

| fault | noticed after | Slurm | Python's imports | ours | together | steps lost | goes on |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""
TAIL = """
- **noticed after**: until a watcher of the ranks has said what is wrong. Nothing where the job was told beforehand, or
  where Slurm itself finds out, which is then in its share.
- **Slurm**: from the end of the job's life to the next one. It finds a silent node after `SlurmdTimeout`, {timeout} s
  here and 300 s by default; it holds a job that was queued again for `cred_expire`, 5 s here and 120 s by default.
- **Python's imports**: of every program that runs between the two lives, timed apart on three nodes at once.
- **ours**: all the rest, the promise being {bound:.0f} s: to save and stop, to judge, to examine the nodes, to meet,
  to load the checkpoint, to train a step. {over}
- A checkpoint is made every {every} steps. Runs that went on with as many nodes ended with weights that are bit for bit
  those of an undisturbed one.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        os.environ[VARIABLE] = str(rows)
        code = pytest.main(["-m", "slow", "-q", str(FOLDER / "test_life_cycle_faults.py"), *sys.argv[1:]])
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if not found:
        sys.exit("no trial was measured, so the page is left as it is")
    PAGE.write_text(page(found), encoding="utf-8")
    sys.exit(code)


def page(rows: list[dict]) -> str:
    from slurm.jobs import EVERY_STEPS

    lines = []
    for row in rows:
        parts = [row[name] for name in ("noticed_s", "slurm_s", "imports_s", "ours_s")]
        cells = [row["fault"], *(f"{part:.1f} s" for part in (*parts, sum(parts))), str(row["steps_lost"])]
        lines.append(f"| {' | '.join([*cells, row['how']])} |")
    over = sum(row["ours_s"] > BOUND_S for row in rows)
    said = f"{over} of these {len(rows)} took longer." if over else "All kept it."
    head = HEAD.format(date=date.today().isoformat(), machine=machine())
    tail = TAIL.format(
        timeout=os.environ.get("SLURM_SIM_NODE_TIMEOUT", "10"), every=EVERY_STEPS, bound=BOUND_S, over=said
    )
    return head + "\n".join(lines) + "\n" + tail


def machine() -> str:
    load = os.getloadavg()[2]
    return f"{os.cpu_count()} cores for all nodes, {platform.machine()}, load {load:.1f} while it was measured"


if __name__ == "__main__":
    main()
