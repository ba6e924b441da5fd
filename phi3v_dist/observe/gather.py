"""One rank's numbers → its node's first rank → rank 0, in gloo groups of their own, for a thread beside training.

What comes in: anything small, on every rank, in the same order. What goes out: the node's on the first rank of each
node, everybody's on rank 0. Surprise: only members of a group make it (`use_local_synchronization`). Else all ranks
would have to meet once for each node of the job, which takes minutes with thousands.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from phi3v_dist.parallel.topology import Topology

LIMIT_S = 120.0  # ranks leave a step together; who is later than this is gone, or the job about to be ended


@dataclass(frozen=True)
class Nodes:
    """hosts: of all ranks. here: the ranks of this node. first: the first rank of each node. The groups are None where
    this rank is no member, or alone."""

    topology: Topology
    hosts: tuple[str, ...]
    here: tuple[int, ...]
    first: tuple[int, ...]
    node: Any = None
    leaders: Any = None

    @classmethod
    def meet(cls, topology: Topology) -> "Nodes":
        """Make the groups. All ranks call it, from their main threads."""
        hosts = tuple(topology.gather(topology.host))
        here = tuple(rank for rank, host in enumerate(hosts) if host == topology.host)
        first = tuple(sorted({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values()))
        # The node's first: torch names a group by how many its members are in already, and leaders are in one more.
        node = _group(here)
        return cls(topology, hosts, here, first, node, _group(first) if topology.rank in first else None)

    @property
    def is_leader(self) -> bool:
        return self.topology.rank == self.here[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of this node's ranks, on its first rank. Raises RuntimeError when another rank is gone."""
        return _gather(value, self.here, self.node, self.is_leader)

    def gather_leaders(self, value: Any) -> list[Any] | None:
        """First ranks of nodes alone: their values, on rank 0, in the order of `first`."""
        return _gather(value, self.first, self.leaders, self.topology.is_main)


def _group(ranks: tuple[int, ...]) -> Any:
    if len(ranks) == 1:
        return None
    return dist.new_group(
        list(ranks), backend="gloo", timeout=timedelta(seconds=LIMIT_S), use_local_synchronization=True
    )


def _gather(value: Any, ranks: tuple[int, ...], group: Any, is_first: bool) -> list[Any] | None:
    if len(ranks) == 1:
        return [value]
    values: list[Any] | None = [None] * len(ranks) if is_first else None
    dist.gather_object(value, values, dst=ranks[0], group=group)
    return values
