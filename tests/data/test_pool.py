"""Threads that decode: all of them at once, quietly, and never in the way of an exit."""

import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from conftest import environment

from phi3v_dist.data.pool import DecodePool


@pytest.mark.timeout(30)
def test_the_samples_of_one_row_are_decoded_by_all_threads() -> None:
    together = threading.Barrier(3)  # is passed only by three at once

    def decode(sample_id: int) -> str:
        together.wait()
        return f"sample {sample_id}"

    with DecodePool(3, str) as pool:
        row = pool.submit([(i, partial(decode, i)) for i in (5, 3, 4)], list)
        assert pool.result(row) == ["sample 5", "sample 3", "sample 4"]


@pytest.mark.timeout(30)
def test_a_row_without_samples_is_ready_and_errors_belong_to_their_row() -> None:
    def fail() -> None:
        raise TimeoutError("of the storage, not of the pool")

    with DecodePool(1, str) as pool:
        bad = pool.submit([(0, fail), (1, fail)], list)
        good = pool.submit([(2, lambda: 7)], list)
        assert pool.result(pool.submit([], len)) == 0 and pool.result(good) == [7]
        with pytest.raises(TimeoutError, match="of the storage"):
            pool.result(bad)


@pytest.mark.timeout(30)
def test_each_thread_computes_alone_and_the_model_keeps_its_threads() -> None:
    counts = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with DecodePool(2, str) as pool:
            works = [(i, torch.get_num_threads) for i in range(4)]
            assert pool.result(pool.submit(works, list)) == [1] * 4
            later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert [torch.get_num_threads(), *counts] == [2, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.fault(62)
@pytest.mark.timeout(60)
def test_a_process_exits_while_a_decode_hangs() -> None:
    script = """
import threading
from phi3v_dist.data import pool
pool.DECODE_LIMIT_S = pool.POLL_S = pool.CLOSE_S = 0.1
with pool.DecodePool(1, "shard.tar:key-{}".format) as decoding:
    decoding.result(decoding.submit([(7, threading.Event().wait)], list))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 1 and "DataError: shard.tar:key-7: this sample has been in" in ended.stderr
