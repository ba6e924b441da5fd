"""Environment of the launcher → who we are, and the process group.

What comes in: the variables of torchrun, the `deepspeed` launcher or Slurm's srun; none of them means one process. What
goes out: a `Topology`, checked. Surprise: on a CPU DeepSpeed compiles a shared-memory extension inside
`init_distributed`, under a lock that a killed build leaves behind, after which every later start hangs. gloo does not
use it, so it is switched off here.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from phi3v_dist.errors import LaunchError


@dataclass(frozen=True)
class Topology:
    """This process among all of the job. `rank` counts over the job, `local_rank` on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Topology":
        """Ranks as the launcher set them.

        Raises:
            LaunchError: some variables are there and others missing, not numbers, or out of range.
        """
        host = socket.gethostname()
        if "RANK" in env:  # torchrun and deepspeed
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun, one task per rank
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        else:
            return cls(host=host)
        rank, world_size, local_rank = (_number(env, name) for name in names[:3])
        local = env.get(names[3], env.get("LOCAL_SIZE", "")).split("(")[0].split(",")[0]
        if not 0 <= rank < world_size:
            raise LaunchError(f"{names[0]}={rank} is not below {names[1]}={world_size} on {host}: check the launcher")
        return cls(rank, world_size, local_rank, int(local) if local.isdigit() else world_size, host)

    def start(self, timeout_s: float) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPUs. Also divides the node's cores among its ranks."""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(self.local_rank)}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port(self.world_size))
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(
            backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
        )

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks, in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdigit():
        raise LaunchError(
            f"{name} is {value!r} although this process was started as one of several: check the launcher"
        )
    return int(value)


def _port(world_size: int) -> int:
    """A free port for one process alone; more of them must have been told theirs."""
    if world_size > 1:
        raise LaunchError("MASTER_PORT is not set: start through torchrun, deepspeed or slurm/train.sh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
