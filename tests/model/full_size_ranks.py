"""torchrun --nproc_per_node 2 full_size_ranks.py BASE RUN: the real model under ZeRO-3 in bf16, without an optimizer.

Loads BASE, answers on one picture of one crop and a question, and saves a checkpoint of what it holds into RUN. Rank
files `memory-RANK.json` in RUN say how much anonymous memory each stage took at most (mapped files apart).
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from PIL import Image

from phi3v_dist.config import Settings
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.model.build import partitioned_model, proven_backend
from phi3v_dist.model.official_config import read_config
from phi3v_dist.parallel import zero
from phi3v_dist.parallel.partitions import Partitions
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.survive.checkpoint import Checkpoints, Position

PROMPT = "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n"
DEEPSPEED = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Memory:
    """The most anonymous memory since the last look, sampled 100 times a second."""

    def __init__(self):
        self.peak_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            time.sleep(0.01)

    def look(self) -> int:
        peak, self.peak_bytes = self.peak_bytes, anonymous_bytes()
        return peak


def main(base: Path, run: Path) -> None:
    torch.set_num_threads(1)
    topology = Topology.from_environment()
    topology.start(timeout_s=3600)
    memory, peaks = Memory(), {}
    settings = Settings.model_validate(
        {"model": {"path": base, "dtype": "bf16"}, "data": {"train": [{"shards": "none.tar"}]},
         "train": {"steps": 1, "rows_per_step": topology.world_size}, "parallel": {"deepspeed": DEEPSPEED}}
    )  # fmt: skip
    hidden_size = read_config(base)["hidden_size"]
    ds_config = zero.resolve(settings, topology.world_size, torch.bfloat16, hidden_size)
    backend = proven_backend(settings, topology.device)
    engine = zero.initialize(partitioned_model(settings, backend, ds_config), None, ds_config)
    peaks["load"] = memory.look()

    inputs = dict(Phi3VProcessor.from_pretrained(base, num_crops=1)(PROMPT, Image.new("RGB", (320, 320), "red")))
    inputs.pop("num_img_tokens")
    began = time.monotonic()
    engine.eval()
    with torch.inference_mode():
        logits = engine(**inputs).logits
    assert logits.isfinite().all() and logits.shape[-1] == 32064
    peaks["forward"] = memory.look()
    peaks["forward_s"] = time.monotonic() - began

    Checkpoints(run / "checkpoints", keep=1).save(engine, Position(1, "full-size", {}, 1, "none"))
    peaks["save"] = memory.look()
    peaks["partition"] = sum(2 * piece.length for piece in Partitions(engine).pieces())
    peaks["logits_sum"] = logits.double().sum().item()
    (run / f"memory-{topology.rank}.json").write_text(json.dumps(peaks))
    topology.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
