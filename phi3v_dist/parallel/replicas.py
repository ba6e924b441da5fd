"""What every rank must hold alike, and what one rank holds twice → nothing, or the rank whose memory changed by itself.

What comes in: an engine between two steps. What goes out: an error that names rank, host and tensors. Surprise: a
rank's share of the weights exists nowhere else, so nobody can be asked; but it exists there twice, as a master and as
its cast for computing, and a bit that flips in one of them makes the two differ.

Not found: a flipped bit in an Adam moment, in a gradient, or in a bf16 run below the precision of bf16 in a master.
The rows of the data are compared elsewhere (`train/accounts.py`).
"""

import json
from collections import Counter
from typing import Any

import torch
import xxhash
from torch import Tensor

from phi3v_dist.errors import CorruptedError
from phi3v_dist.parallel import partitions
from phi3v_dist.parallel.fingerprint import fingerprint, fingerprint_text
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import Topology

TENSORS_SHOWN = 5


def compare(engine: Any, topology: Topology) -> None:
    """Collective, between two steps.

    Call it every `watch.compare_every_steps` steps, and before a save, which would make damage permanent.

    Raises:
        CorruptedError: on all ranks alike.
    """
    digests = _digests(engine)
    total = xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())
    everyone = topology.gather((topology.host, total, partitions.cast_differences(engine)))
    ranks = [f"rank {rank} on {host}" for rank, (host, _, _) in enumerate(everyone)]
    found = [
        f"{rank}: master and computing copy differ in {_listed(names)}"
        for rank, (_, _, names) in zip(ranks, everyone, strict=True)
        if names
    ]
    if len({total for _, total, _ in everyone}) > 1:
        found += _strangers(engine, topology, digests, ranks)
    if found:
        raise CorruptedError(
            [
                f"step {engine.global_steps}: numbers in memory changed that nobody wrote, so the weights of this "
                "moment cannot be trusted. Start again from the last checkpoint, without the node that is named here, "
                "and have its memory tested",
                *found,
            ]
        )


def _digests(engine: Any) -> dict[str, str]:
    """Name → digest of each thing that must be alike on all ranks; the device is waited for once."""
    tensors = partitions.replicated(engine)
    found = {f"`{name}` of the engine": json.dumps(value) for name, value in Partitions(engine).settings().items()}
    if tensors:
        sums = [fingerprint(tensor.flatten()).to(engine.device) for tensor in tensors.values()]
        found |= dict(zip(tensors, map(fingerprint_text, torch.stack(sums).cpu()), strict=True))
    return found


def _strangers(engine: Any, topology: Topology, digests: dict[str, str], ranks: list[str]) -> list[str]:
    """Who holds something else. Gathered weights are judged by their owners' shares, all else by the majority."""
    everyone = topology.gather(digests)
    tensors = partitions.replicated(engine)
    weights = {partitions.official_name(name) for name, _ in engine.module.named_parameters()}
    wrong: dict[int, list[str]] = {}
    undecided = []
    for name in digests:
        seen = [theirs.get(name) for theirs in everyone]
        if len(set(seen)) == 1:
            continue
        strangers = _minority(seen)
        if name in weights:
            strangers = _unlike_their_owners(engine, topology, name, tensors[name])
        if not strangers:
            undecided.append(name)
        for rank in strangers:
            wrong.setdefault(rank, []).append(name)
    lines = [f"{ranks[rank]}: its copy of {_listed(names)} is another one" for rank, names in sorted(wrong.items())]
    if undecided:
        lines.append(f"{', '.join(ranks)}: each holds another {_listed(undecided)}, and no majority says who is right")
    return lines


def _unlike_their_owners(engine: Any, topology: Topology, name: str, copy: Tensor) -> list[int]:
    """Ranks whose gathered copy of a weight is not what its owners have."""
    start, share = partitions.own_share(engine, name)
    mine = copy.flatten().cpu()
    is_right = True
    for begin, elements in topology.gather((start, share.cpu())):
        is_right &= fingerprint(mine[begin : begin + len(elements)]).equal(fingerprint(elements))
    return [rank for rank, fine in enumerate(topology.gather(is_right)) if not fine]


def _minority(seen: list[str | None]) -> list[int]:
    """Ranks that differ from what more than half of them have; empty when there is no such half."""
    (value, count), *_ = Counter(seen).most_common(1)
    return [rank for rank, theirs in enumerate(seen) if theirs != value] if 2 * count > len(seen) else []


def _listed(names: list[str]) -> str:
    rest = len(names) - TENSORS_SHOWN
    return ", ".join(names[:TENSORS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
