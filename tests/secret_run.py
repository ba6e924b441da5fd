"""launch/train.py for test_secrets.py, with one rank that crashes in a step and in a thread, its words full of secrets.

torchrun … secret_run.py --config …       ADDRESS in the environment is quoted in the crash, at step CRASH_STEP
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from phi3v_dist.cli import train
from phi3v_dist.train import loop

trained = loop.train_step


def crashing_step(engine, plan, batches, rates, topology, *more):
    if engine.global_steps + 1 == int(os.environ["CRASH_STEP"]) and topology.rank == 1:
        words = f"refused: {os.environ['ADDRESS']} with {os.environ['AWS_SECRET_ACCESS_KEY']}"
        print(f"asking with {os.environ['HF_TOKEN']}", flush=True)  # one piece: the other rank prints there, too
        thread = threading.Thread(target=lambda: 1 / len(os.environ["AWS_SESSION_TOKEN"] and []), name=words)
        thread.start()
        thread.join()
        raise RuntimeError(words) from ValueError(f"https://user:{os.environ['WANDB_API_KEY']}@example.org/x")
    return trained(engine, plan, batches, rates, topology, *more)


if __name__ == "__main__":
    loop.train_step = crashing_step
    train.main()
