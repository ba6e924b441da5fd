"""Pairs of gloo ranks that end while gloo's threads still hold tensors. Prints their exit codes, and what they wrote.

python exit_ranks.py NUM_PAIRS HOW          HOW: end_process, or `interpreter`, which crashes most of them
"""

import atexit
import json
import os
import sys
import tempfile
import threading
import time

import torch
import torch.distributed as dist

from phi3v_dist.parallel.process_end import end_process

EXIT_CODE = 3
NUM_OPERATIONS = 30  # whose results Python objects hold


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    pending = [dist.all_reduce(torch.ones(200_000), async_op=True) for _ in range(NUM_OPERATIONS)]
    futures = [operation.get_future().then(lambda future: future.value()) for operation in pending]
    del pending, futures


def main() -> None:
    num_pairs, how = int(sys.argv[1]), sys.argv[2]
    codes = []
    for _ in range(num_pairs):
        ranks = []
        store = tempfile.mktemp()
        for rank in range(2):
            if pid := os.fork():
                ranks.append(pid)
                continue
            threading.Thread(target=lambda: (time.sleep(0.2), print("thread ended"))).start()
            atexit.register(print, "at exit")
            work(rank, store)
            if how == "end_process":
                end_process(EXIT_CODE)
            sys.exit(EXIT_CODE)
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
