"""The run that is about to start → one line of its log, and RUN/plan.json for the report at its end.

What comes in: settings, ranks, the first rows of the plan. What goes out: planned peak bytes of a rank. Surprise: the
file is kept for as long as nothing that it rests on changes, so that a restart costs nothing; and a plan that cannot be
made stops no training.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from phi3v_dist.config import Settings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.invocation import as_typed
from phi3v_dist.model.build import compute_dtype
from phi3v_dist.model.official_config import read_config
from phi3v_dist.parallel import zero
from phi3v_dist.planner.record import keep_plan, read_plan

FORMAT = 2  # 2: with what a step costs
GIB = 2**30
log = logging.getLogger(__name__)


def write_plan(settings: Settings, world_size: int, device: torch.device, rows: Sequence[PlannedRow]) -> None:
    """Say what a rank will hold, and keep it in the run folder. For rank 0."""
    dtype = compute_dtype(settings.model.dtype, device)
    config = read_config(settings.model.path)
    ds_config = zero.resolve(settings, world_size, dtype, config["hidden_size"])
    sections = [settings.model, settings.train.parts, settings.train.lora, settings.parallel]
    words = [FORMAT, world_size, device.type, str(dtype), ds_config, config, [str(row) for row in rows],
             *(section.model_dump(mode="json") for section in sections)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
    known = read_plan(settings.run.folder)
    if known.get("digest") != digest:
        try:
            known = {"digest": digest} | _compute(settings, world_size, device, dtype, config, ds_config, rows)
        except Exception as error:  # whatever it is: training needs no plan
            log.warning("plan     could not be made: %s: %s", type(error).__name__, error)
            return
        keep_plan(settings.run.folder, known)
    largest = sorted(known["causes"].items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    log.info("plan     %.2f GiB a rank at the worst moment (%s); docs/planner.md", known["peak_bytes"] / GIB, parts)
    if device.type == "cuda" and known["peak_bytes"] > torch.cuda.mem_get_info(device)[1]:
        log.warning(
            "plan     that is more than this GPU has; %s --nodes N says what to change", as_typed("launch/check.py")
        )


def _compute(
    settings: Settings, world_size: int, device: torch.device, dtype: torch.dtype, config: dict[str, Any],
    ds_config: dict[str, Any], rows: Sequence[PlannedRow],
) -> dict[str, Any]:  # fmt: skip
    from phi3v_dist.planner.cost import Cluster, cost
    from phi3v_dist.planner.gpus import gpu_of
    from phi3v_dist.planner.memory import memory, owners, unseen_terms  # a second of imports, only where it is needed
    from phi3v_dist.planner.row import shape_of, timeline
    from phi3v_dist.planner.zero_share import zero_share

    began = time.perf_counter()
    row, sequence = shape_of(rows), settings.parallel.sequence
    held_by = owners(config, settings.model, settings.train)
    share = zero_share([w for own in held_by.values() for w in own], ds_config, world_size, dtype.itemsize)
    unseen = unseen_terms(config, -(-row.tokens // sequence)) if device.type == "cuda" else {}
    found = memory(timeline(config, settings.model, settings.train, row, dtype, sequence), held_by, share, unseen)
    costs = {}
    if gpu := gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None:
        here = min(world_size, torch.cuda.device_count())
        expected = cost(
            settings, config, Cluster(world_size // here, here, gpu), row, itemsize=dtype.itemsize,
            trained=sum(w.elements for own in held_by.values() for w in own if w.trained),
            gathered_elements=found.gathered_elements,
        )  # fmt: skip
        costs = {"cost": {"step_s": expected.step_s, "tokens_per_s": expected.tokens_per_s}}
    return costs | {
        "peak_bytes": found.total, "traced_bytes": found.traced, "causes": found.causes, "when": found.when,
        "row_tokens": row.tokens, "row_crops": row.crops, "seconds": time.perf_counter() - began,
    }  # fmt: skip
