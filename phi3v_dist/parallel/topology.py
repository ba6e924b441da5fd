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

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel import slurm_step
from phi3v_dist.parallel.meeting import meet
from phi3v_dist.parallel.process_end import mark_rank
from phi3v_dist.parallel.variables import host_name, number


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
        if not torch.cuda.is_available():
            return torch.device("cpu")
        bound = torch.cuda.device_count() == 1  # Slurm's --gpus-per-task shows each task its own GPU alone
        return torch.device("cuda", 0 if bound else self.local_rank)

    @property
    def device_uuid(self) -> str:
        """Of this rank's GPU, as nvidia-smi names it; empty without one."""
        if self.device.type != "cuda":
            return ""
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Topology":
        """Ranks as the launcher set them.

        Raises:
            LaunchError: some variables are there and others missing, not numbers, out of range or in contradiction.
        """
        if "RANK" in env:  # torchrun and deepspeed
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            local_name = "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"  # deepspeed's, torchrun's
            local_world_size = number(env, local_name, default=number(env, "WORLD_SIZE"))
            slurm_step.require_own_rank(env)
        elif slurm_step.num_tasks(env) > 1:  # srun, one task per rank
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            local_name = "SLURM_STEP_TASKS_PER_NODE"
            local_world_size = slurm_step.tasks_on_this_node(env)
        elif number(env, "WORLD_SIZE", default=1) > 1:
            raise LaunchError(f"WORLD_SIZE is {env['WORLD_SIZE']} but RANK is not set: check the launcher")
        else:
            return cls(host=host_name(env))
        rank, world_size, local_rank = (number(env, name) for name in names)
        host = host_name(env)
        bounds = ((names[0], rank, names[1], world_size), (names[2], local_rank, local_name, local_world_size))
        for name, value, limit_name, limit in bounds:
            if value >= limit:
                raise LaunchError(f"{name}={value} is not below {limit_name}={limit} on {host}: check the launcher")
        if local_world_size > world_size:
            raise LaunchError(f"{local_name}={local_world_size} is above {names[1]}={world_size}: check the launcher")
        return cls(rank, world_size, local_rank, local_world_size, host)

    def start(self, timeout_s: float) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPUs. Also divides the node's cores among its ranks.

        Raises:
            LaunchError: the ranks do not know where to meet, cannot meet there, or some of them have not come.
            LostRankError: rank 0 has not come, or has gone.
        """
        is_task = slurm_step.is_rank(os.environ, self.rank, self.world_size)
        alone = "RANK" not in os.environ  # launchers set OMP_NUM_THREADS to 1 whatever the machine; a person means it
        if not (alone and "OMP_NUM_THREADS" in os.environ):
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(slurm_step.num_threads(os.environ, cores, self.local_world_size, is_task))
        local_rank = self.local_rank
        if torch.cuda.is_available():
            local_rank = self.device.index  # DeepSpeed takes LOCAL_RANK for the number of the GPU
            if local_rank >= torch.cuda.device_count():
                found = f"{self.local_world_size} ranks on {self.host}, but {torch.cuda.device_count()} GPUs"
                raise LaunchError(f"{found}: start one rank per GPU, or ask for more of them")
            torch.cuda.set_device(self.device)
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(local_rank)}
        if is_task:
            os.environ.update(slurm_step.meeting_point(os.environ) | os.environ)
        if self.world_size > self.local_world_size and "MASTER_ADDR" not in os.environ:
            raise LaunchError("MASTER_ADDR is not set: start through torchrun, deepspeed or srun")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port(self.world_size))
        import deepspeed

        mark_rank()
        switch_off_shm_op()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            self._meet(backend, timeout_s)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
            require_no_shm_op()
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = int(os.environ["MASTER_PORT"])
            raise LaunchError(
                f"the ranks were to meet at port {port} of {self.host}, but {_holder(port)} listens there already: end "
                "it if it is left from an earlier run, or set another MASTER_PORT (--master_port of the launcher; "
                "the next srun of a Slurm job takes another one by itself)"
            ) from error

    def _meet(self, backend: str, timeout_s: float) -> None:
        """The process group, once all have come."""
        store = meet(self.rank, self.world_size, self.host, timeout_s)
        dist.init_process_group(
            backend, store=dist.PrefixStore("training", store), rank=self.rank, world_size=self.world_size,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip

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

    def max(self, values: list[float]) -> list[float]:
        """Element by element over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
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

    def gather_on_main(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; nothing on the others, which need not hold what may be large."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values or []


def switch_off_shm_op() -> None:
    """Keep DeepSpeed's `init_distributed` from compiling its shared-memory operation."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # only on CPUs
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def require_no_shm_op() -> None:
    """Raise LaunchError if DeepSpeed did not look at the switch of `switch_off_shm_op`."""
    from deepspeed.comm import comm

    if getattr(comm.cdb, "shm_comm_op", None) is not None:
        raise LaunchError(
            "DeepSpeed has loaded its shared-memory operation although it is switched off: this version looks at "
            "another switch than parallel/topology.py sets, and a later start could hang in a build"
        )


def _port(world_size: int) -> int:
    """A free port for one process alone; more of them must have been told theirs."""
    if world_size > 1:
        raise LaunchError("MASTER_PORT is not set: start through torchrun, deepspeed or srun")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    """Who listens at a port of this machine, as far as one may know; no command line, which may hold secrets."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({process.name()} of {process.username()})"
            except psutil.Error:
                break  # it has just ended, or is hidden
    return "another process"
