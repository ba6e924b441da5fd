"""Who a process is, from the variables of each launcher, and what makes them unbelievable."""

import socket
from types import SimpleNamespace

import pytest
import torch

from phi3v_dist.attempt.owner import Owner
from phi3v_dist.errors import LaunchError
from phi3v_dist.parallel.topology import Topology, require_no_shm_op, switch_off_shm_op

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}  # fmt: skip


def numbers(env):
    found = Topology.from_environment(env)
    return found.rank, found.world_size, found.local_rank, found.local_world_size


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0, 1)),
        (TORCHRUN, (5, 8, 1, 4)),
        (DEEPSPEED, (3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1, 2)),
        (SRUN, (6, 7, 0, 1)),
        (SRUN | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}, (5, 7, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x3)", "SLURM_LOCALID": "1"}, (6, 7, 1, 2)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_LOCALID": "6", "SLURM_NODEID": "0"}, (6, 7, 6, 7)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),  # a batch shell, no srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0, 1)),
        (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (5, 8, 1, 4)),
        (DEEPSPEED | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, (3, 4, 1, 2)),
    ],
)
def test_ranks_are_those_of_the_launcher(env, expected):
    assert numbers(env) == expected


@pytest.mark.parametrize("env", [{}, TORCHRUN, SRUN])
def test_under_slurm_a_node_has_the_name_that_slurm_gives_it(env):
    for name, host in (("gpu-0017", "gpu-0017"), ("", socket.gethostname())):
        named = env | {"SLURMD_NODENAME": name}
        assert Topology.from_environment(named).host == Owner.of_this_process(1, named).host == host
    assert Topology.from_environment(env).host == Owner.of_this_process(1, env).host == socket.gethostname()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is ''"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE is 2 but RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is above WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE is 'eight'"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_SIZE=2"),
        (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID=7 is not below SLURM_STEP_NUM_TASKS=7"),
        (SRUN | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1 is not below SLURM_STEP_TASKS_PER_NODE=1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "8"}, "does not fit SLURM_STEP_NUM_TASKS=8"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, "'2(x3' on node 3, which does not fit"),
        (SRUN | {"SLURM_NODEID": "4"}, "on node 4, which does not fit"),
        # expanded in the batch script: every task would be rank 0
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "7", "LOCAL_RANK": "0"},
            "RANK is 0, but Slurm says that this is task 6 of 7",
        ),
    ],
)
def test_contradictory_or_missing_variables_are_refused(env, message):
    with pytest.raises(LaunchError) as caught:
        Topology.from_environment(env)
    assert message in str(caught.value)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(4, 3, 3), (1, 3, 0)])
def test_a_rank_that_is_shown_its_own_gpu_alone_takes_that_one(monkeypatch, visible, local_rank, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert Topology(local_rank, 4, local_rank, 4).device == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused_before_the_process_group(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="4 ranks on n1, but 2 GPUs"):
        Topology(3, 4, 3, 4, "n1").start(timeout_s=1.0)


@pytest.mark.parametrize(("local_world_size", "name"), [(2, "MASTER_PORT"), (1, "MASTER_ADDR")])
def test_several_ranks_without_a_meeting_point_are_refused(monkeypatch, local_world_size, name):
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, "")  # so that what `start` sets is undone
        monkeypatch.delenv(variable)
    with pytest.raises(LaunchError, match=f"{name} is not set"):
        Topology(0, 2, 0, local_world_size).start(timeout_s=1.0)


def test_one_process_needs_no_process_group():
    alone = Topology()
    alone.barrier()
    assert alone.is_main and not Topology(1, 2).is_main
    assert (alone.sum([1.0, 2.5]), alone.gather({"a": 1}), alone.broadcast("x")) == ([1.0, 2.5], [{"a": 1}], "x")
    alone.stop()


def test_deepspeed_does_not_build_its_shared_memory_operation(monkeypatch):
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {ShareMemCommBuilder.NAME: True}, raising=False)
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda *_: pytest.fail("it is built"))
    switch_off_shm_op()
    assert build_shm_op() is None


def test_a_deepspeed_that_looks_at_another_switch_is_named(monkeypatch):
    from deepspeed.comm import comm

    for backend in (None, SimpleNamespace(), SimpleNamespace(shm_comm_op=None)):
        monkeypatch.setattr(comm, "cdb", backend)
        require_no_shm_op()
    monkeypatch.setattr(comm, "cdb", SimpleNamespace(shm_comm_op=object()))
    with pytest.raises(LaunchError, match="shared-memory operation although it is switched off"):
        require_no_shm_op()
