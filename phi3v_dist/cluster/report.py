"""What one node found out about itself ↔ `RUN/preflight/HOST.json`.

What comes in: the outcome of each check. What goes out: a file that the first node judges all nodes by, whatever became
of the network. Surprise: a report is written twice. The first one, before the network is touched, is what remains of a
node that the network probe stops for ever.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from phi3v_dist.errors import Phi3VError
from phi3v_dist.survive.durable import no_links, write_durably

FORMAT = "phi3v-preflight-1"
FOLDER_NAME = "preflight"  # in the run folder
ENDING = ".json"
MAX_BYTES = 1 << 20  # a larger file is none of ours
KEPT_FAILURES = 20
LAUNCH, CONFIGURATION, DATA = "launch", "configuration", "data"  # whose fault, as in errors.py
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Check:
    """The outcome of one look. detail: a few words on what was found; kind: whose fault its problems are, if any."""

    name: str
    detail: str = ""
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    kind: str = LAUNCH
    seconds: float = 0.0
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Failure:
    """What an earlier start found wrong with this node."""

    token: str
    problems: tuple[str, ...]
    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Report:
    """One node at one start.

    token: names the start (job, requeue, start in place). is_complete: the network probe is over.
    facts: what must be alike on all nodes; settings: by dotted key, as text, to say which of them differ.
    speeds: TFLOP/s of each device, of the CPU where there is none. num_gpus: that torch sees.
    edges: MB/s to each neighbour, 0 where it failed; timed_out: those with whom it merely did not end in time.
    earlier: failures of this host at earlier starts, oldest first.
    """

    host: str
    token: str
    is_complete: bool = False
    has_gpus: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    speeds: tuple[float, ...] = ()
    num_gpus: int = 0
    edges: dict[str, float] = field(default_factory=dict)
    timed_out: tuple[str, ...] = ()
    earlier: tuple[Failure, ...] = ()
    __pydantic_config__ = _STRICT

    @property
    def problems(self) -> list[str]:
        return [problem for check in self.checks for problem in check.problems]

    def after(self, previous: "Report | None") -> "Report":
        """The same, with the history of this host's last report."""
        if previous is None:
            return self
        failed = previous.problems if previous.token != self.token else []
        more = (Failure(previous.token, tuple(failed)),) if failed else ()
        return replace(self, earlier=(*previous.earlier, *more)[-KEPT_FAILURES:])

    def write(self, folder: Path) -> None:
        """Durably, as HOST.json. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path_of(folder, self.host), json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


_CHECKED: TypeAdapter[Report] = TypeAdapter(Report)


def path_of(folder: Path, host: str) -> Path:
    return folder / f"{host}{ENDING}"


def read_report(path: Path) -> Report | None:
    """None when there is no such file, or it is damaged, of another format or another host's."""
    try:
        with open(path, "rb", opener=no_links) as file:
            data = file.read(MAX_BYTES + 1)
        tree = json.loads(data) if len(data) <= MAX_BYTES else {}
        if tree.pop("format") != FORMAT:
            return None
        report = _CHECKED.validate_python(tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError):
        return None
    return report if report.host == path.name.removesuffix(ENDING) else None


def refused(host: str, token: str, folder: Path, error: Phi3VError) -> Report:
    """Write the report of a node that does not get as far as looking at itself. Raises OSError."""
    problems = Check("settings", "", tuple(error.problems), kind=CONFIGURATION)
    report = Report(host, token, is_complete=True, checks=(problems,)).after(read_report(path_of(folder, host)))
    report.write(folder)
    return report


def read_reports(folder: Path, hosts: Iterable[str] | None = None) -> list[Report]:
    """Of these hosts, or of all that ever reported, by name."""
    names = (
        [path.name for path in folder.glob(f"*{ENDING}")] if hosts is None else [f"{host}{ENDING}" for host in hosts]
    )
    found = [read_report(folder / os.path.basename(name)) for name in sorted(names)]
    return [report for report in found if report is not None]
