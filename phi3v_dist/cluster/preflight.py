"""One node before training: it examines itself, reports, tries the network, and reports again.

What comes in: settings, a report folder that all nodes see, the name of this start. What goes out: `HOST.json` there.
Surprise: nothing here is collective until the first report is on the disk, and whatever the network then does, the
second one is written in time, by a thread that waits for nobody.
"""

import os
import time
from dataclasses import replace

import torch

from phi3v_dist import config
from phi3v_dist.attempt import environment
from phi3v_dist.cluster import devices, gpus, machine, network, storage, talk
from phi3v_dist.cluster.checking import LOOKS_FRAC, MEET_FRAC, PROBE_FRAC, Look, Notes, Place, check
from phi3v_dist.cluster.entries import NETWORK, SUM
from phi3v_dist.cluster.report import CONFIGURATION, DATA, LAUNCH, Check, Report, path_of, read_report
from phi3v_dist.cluster.talk import Patience, Talk
from phi3v_dist.printable import printable

LOOKS: tuple[tuple[str, Look, str], ...] = (  # after the GPUs and before the arithmetic, which are looked at apart
    ("flash-attn", devices.flash_attention, CONFIGURATION),
    ("shared memory", machine.shared_memory, LAUNCH),
    ("limits", machine.limits, LAUNCH),
    ("run folder", storage.run_folder, CONFIGURATION),
    ("node folders", storage.node_folders, CONFIGURATION),
    ("space", storage.space, CONFIGURATION),
    ("model folder", storage.model_folder, CONFIGURATION),
    ("shards", storage.shards, DATA),
    ("host memory", machine.host_memory, LAUNCH),
    ("clock", machine.clock, LAUNCH),
)
WAIT_FOR_PROBE = {  # NCCL then gives up a wait with an error, instead of ending the process
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_BLOCKING_WAIT": "1",
}  # fmt: skip
SHOWN_CHARACTERS = 400  # of a setting's value


def examine(place: Place, token: str) -> Report:
    """What can be told without any other node, written down. Raises OSError when it cannot be."""
    report = Report(place.host, token).after(read_report(path_of(place.folder, place.host)))
    first = check("GPUs", gpus.gpus, place)
    facts, found = _facts(place)
    checks = [first, facts, *(check(name, look, place, kind) for name, look, kind in LOOKS)]
    speeds: list[float] = []
    checks.append(check("arithmetic", lambda _, notes: speeds.extend(devices.arithmetic(notes)), place))
    report = replace(
        report, facts=found["facts"], settings=found["settings"], checks=tuple(checks), speeds=tuple(speeds),
        has_gpus=torch.cuda.is_available(), num_gpus=torch.cuda.device_count(),
    )  # fmt: skip
    report.write(place.folder)
    return report


def patience_of(place: Place, pause_s: float) -> Patience:
    """How long to wait in the network probe, so that all is over in time. pause_s: for one more node to come."""
    come_s = max(place.left_s(LOOKS_FRAC + MEET_FRAC), 1.0)
    whole_s = PROBE_FRAC * place.limit_s
    return Patience.of(place.num_nodes, torch.cuda.is_available(), pause_s, come_s, whole_s)


def probe(report: Report, place: Place, patience: Patience) -> Report:
    """Take part in the network probe, and write the report again. Raises OSError when it cannot be written."""
    began_s = time.monotonic()
    result = Talk()
    if place.num_nodes > 1:
        os.environ |= WAIT_FOR_PROBE
        try:
            talk.within(
                patience.come + patience.whole,
                lambda: network.take_part(place.folder, report.token, place.host, place.num_nodes, patience, result),
            )
        except TimeoutError as error:
            result.notes.warn(f"the network probe did not end in time, {result.at}: {error}")
        except Exception as error:  # of a network, a driver or a file server that may be broken in any way
            result.broke_off(talk.first_words(error))
    seconds = round(time.monotonic() - began_s, 3)
    notes, total = result.notes, result.total
    notes.detail = "one node alone" if place.num_nodes == 1 else "neighbours were tried"
    outcome = [Check(NETWORK, notes.detail, tuple(notes.problems), tuple(notes.warnings), LAUNCH, seconds)]
    if total.detail or total.problems or total.warnings:
        outcome.append(Check(SUM, total.detail, tuple(total.problems), tuple(total.warnings)))
    report = replace(
        report, checks=(*report.checks, *outcome), edges=dict(result.edges), timed_out=tuple(result.timed_out),
        is_complete=True,
    )  # fmt: skip
    report.write(place.folder)
    return report


def _facts(place: Place) -> tuple[Check, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, str]] = {"facts": {}, "settings": {}}

    def look(place: Place, notes: Notes) -> None:
        settings = environment.shared_settings(config.dump(place.settings))
        found["facts"] = environment.facts(settings)
        found["settings"] = {key: printable(repr(value))[:SHOWN_CHARACTERS] for key, value in settings.items()}
        notes.detail = f"python {found['facts']['python']}, torch {found['facts']['torch']}"

    return check("versions", look, place), found
