"""Environment of the launcher → who we are, and the process group.

What comes in: the variables of torchrun, the `deepspeed` launcher or Slurm's srun; none of them means one process. What
goes out: a `Topology`, checked. Surprise: on a CPU DeepSpeed compiles a shared-memory extension inside
`init_distributed`, under a lock that a killed build leaves behind, after which every later start hangs. gloo does not
use it, so it is switched off here.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.errors import LaunchError

RANK_0_LOOKS_S = 6 * 3600  # at most, before the ranks meet; later waits have `parallel.timeout_s`


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

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Topology":
        """Ranks as the launcher set them.

        Raises:
            LaunchError: some variables are there and others missing, not numbers, out of range or in contradiction.
        """
        num_tasks = _number(env, "SLURM_STEP_NUM_TASKS", default=1)  # of this srun; a batch shell has none
        if "RANK" in env:  # torchrun and deepspeed
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            local_name = "LOCAL_SIZE" if "LOCAL_SIZE" in env else "LOCAL_WORLD_SIZE"  # deepspeed's, torchrun's
            local_world_size = _number(env, local_name, default=_number(env, "WORLD_SIZE"))
            _check_against_slurm(env, num_tasks)
        elif num_tasks > 1:  # srun, one task per rank
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            local_name = "SLURM_STEP_TASKS_PER_NODE"
            local_world_size = _tasks_on_this_node(env, num_tasks)
        elif _number(env, "WORLD_SIZE", default=1) > 1:
            raise LaunchError(f"WORLD_SIZE is {env['WORLD_SIZE']} but RANK is not set: check the launcher")
        else:
            return cls(host=socket.gethostname())
        rank, world_size, local_rank = (_number(env, name) for name in names)
        host = socket.gethostname()
        bounds = ((names[0], rank, names[1], world_size), (names[2], local_rank, local_name, local_world_size))
        for name, value, limit_name, limit in bounds:
            if value >= limit:
                raise LaunchError(f"{name}={value} is not below {limit_name}={limit} on {host}: check the launcher")
        if local_world_size > world_size:
            raise LaunchError(f"{local_name}={local_world_size} is above {names[1]}={world_size}: check the launcher")
        return cls(rank, world_size, local_rank, local_world_size, host)

    def start(self, timeout_s: float) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPUs. Also divides the node's cores among its ranks."""
        alone = "RANK" not in os.environ  # launchers set OMP_NUM_THREADS to 1 whatever the machine; a person means it
        if not (alone and "OMP_NUM_THREADS" in os.environ):
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))
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
        if self.world_size > self.local_world_size and "MASTER_ADDR" not in os.environ:
            raise LaunchError("MASTER_ADDR is not set: start through torchrun, deepspeed or slurm/train.sh")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port(self.world_size))
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            self._meet(backend, timeout_s)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = int(os.environ["MASTER_PORT"])
            raise LaunchError(
                f"the ranks were to meet at port {port} of {self.host}, but {_holder(port)} listens there already: end "
                "it if it is left from an earlier run, or set another MASTER_PORT (--master_port of the launcher)"
            ) from error

    def _meet(self, backend: str, timeout_s: float) -> None:
        """The process group, once rank 0 has looked at everything: building indexes may take it hours."""
        looks = timedelta(seconds=max(timeout_s, RANK_0_LOOKS_S))
        store, _, _ = next(iter(dist.rendezvous("env://", self.rank, self.world_size, timeout=looks)))
        key = f"rank 0 has looked/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if self.is_main:
            store.set(key, "")
        else:
            store.wait([key], looks)
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


def _check_against_slurm(env: Mapping[str, str], num_tasks: int) -> None:
    """RANK given by hand in the batch script, where it is the same for every task, makes all of them rank 0."""
    launched = "GROUP_RANK" in env or "CROSS_RANK" in env  # set by torchrun, by deepspeed
    if launched or num_tasks == 1 or env["RANK"] == env.get("SLURM_PROCID"):
        return
    raise LaunchError(
        f"RANK is {env['RANK']}, but Slurm says that this is task {env.get('SLURM_PROCID')} of {num_tasks}: leave "
        "RANK, WORLD_SIZE and LOCAL_RANK out of the batch script, srun's own variables are enough"
    )


def _tasks_on_this_node(env: Mapping[str, str], num_tasks: int) -> int:
    """SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1" for nodes with 2, 2, 2 and 1 tasks → those of this node."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE")
    if text is None:
        return num_tasks
    groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group) for group in text.split(",")]
    counts = [int(group[1]) for group in groups if group for _ in range(int(group[2] or 1))]
    node = _number(env, "SLURM_NODEID", default=0)
    if not all(groups) or sum(counts) != num_tasks or node >= len(counts):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE is {text!r} on node {node}, which does not fit "
            f"SLURM_STEP_NUM_TASKS={num_tasks}: check the srun line"
        )
    return counts[node]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, "" if default is None else str(default))
    if not value.isdecimal():
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
