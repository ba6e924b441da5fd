"""What one rank knows → what all ranks know, apart from training's own collectives.

In: any small value of this rank. Out: the values of all ranks, in order. Surprise: a writer thread uses this while the
main thread trains. That is safe because the group of processes it talks in is its own; groups are made in the main
thread, by all ranks, before the first save.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from phi3v_dist.errors import CheckpointError, LostRankError
from phi3v_dist.parallel.variables import host_name

SLOWEST_RANK_TIMEOUT_S = 3600  # how long ranks that have written their share wait for the last one
T = TypeVar("T")


class Ranks:
    """All ranks of the job, as those see them who save and load. One process without a group is a job of one."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """As a person looks for it."""
        return f"rank {self.rank} on {host_name()}"

    def meet(self) -> None:
        """Make the group. Collective; main thread only."""
        if self.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SLOWEST_RANK_TIMEOUT_S))

    def everyone(self, value: T) -> list[T]:
        """Every rank's value, on every rank. Raises LostRankError when a rank is gone."""
        if self.world_size == 1:
            return [value]
        self.meet()
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return values

    def first(self, value: T) -> T:
        """Rank 0's value, on every rank. Raises LostRankError when a rank is gone."""
        if self.world_size == 1:
            return value
        self.meet()
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return box[0]

    def agreed(self, task: Callable[[], None]) -> None:
        """Do it on every rank; if one cannot, all raise what it says."""
        error = None
        try:
            task()
        except CheckpointError as found:
            error = found
        errors = [found for found in self.everyone(error) if found is not None]
        if errors:
            raise errors[0]

    def _lost(self, error: RuntimeError) -> LostRankError:
        what = " ".join(str(error).split()).split(". ")[0]
        return LostRankError(f"{self.name} lost another rank while a checkpoint was agreed on: {what}")
