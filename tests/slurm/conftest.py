"""The virtual Slurm cluster of a test session: `slurm` for each test, `slurm_cluster` for fixtures that outlive one."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NO_CLUSTER

from slurm.cluster import Cluster, why_not

NUM_NODES = 4


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Up for the whole session, in a folder of its own (its name is short: sockets are made in it)."""
    reason = why_not()
    if reason:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI must run the Slurm tests: {reason}", pytrace=False)
        pytest.skip(NO_CLUSTER + reason)
    cluster = Cluster(Path(f"/tmp/slurm-{secrets.token_hex(3)}"), NUM_NODES)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def undisturbed(slurm_cluster, launched) -> Path:
    """The folder of a finished run on three nodes that nothing happened to."""
    from slurm.jobs import submit

    slurm_cluster.reset()
    job = submit(slurm_cluster, *launched, "undisturbed", slow=0)
    job.until_finished()
    return job.run


@pytest.fixture
def slurm(slurm_cluster) -> Cluster:
    """The cluster with every node idle, whatever the test before left behind."""
    slurm_cluster.reset()
    return slurm_cluster
