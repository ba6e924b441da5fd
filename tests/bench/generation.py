"""Generation: with a cache and without, a batch and its rows one by one, long prompts in slices and whole.

What comes in: a folder. What goes out: `Figure`s. Surprise: the side without a cache is not made slow on purpose: it
too encodes each picture once and keeps the prompt's embeddings, computes no padding, and makes logits of last positions
alone. What is left is the cache. Tokens are compared too; where an answer parts from the other's the figure says so.

    python tests/bench/run.py --only generation
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from figures import Figure

NEW_TOKENS, BATCH = 512, 8
LONG_PROMPT = 32_768
MIB = 2**20


def figures(folder: Path) -> list[Figure]:
    from phi3v_dist.data.importers.sample import vocabulary_text
    from phi3v_dist.model.tiny import write_tiny

    write_tiny(folder / "tiny", vocabulary_text())
    return [cache(folder / "tiny"), batch(folder / "tiny"), prefill()]


def prompts_of(folder: Path) -> list:
    """One picture (313 tokens) and a question of another length in each."""
    import numpy as np

    from phi3v_dist.data.processor import Phi3VProcessor
    from phi3v_dist.data.samples import Message

    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (300, 300, 3), dtype=np.uint8) for _ in range(BATCH)]
    return [
        processor.encode_prompt([Message("user", (0, "What is it? " * (n + 1)))], [picture], sample_id=n)
        for n, picture in enumerate(pictures)
    ]


@torch.inference_mode()
def without_cache(model, prompts: list, num_tokens: int) -> list[list[int]]:
    """Greedy answers of a batch, every text run as a whole for each token, as documents of one flat row."""
    from phi3v_dist.evaluate.generate import _Rows
    from phi3v_dist.model.attention import Layout

    embeds = list(_Rows(model, prompts, num_tokens)._embed(prompts).split([len(p.input_ids) for p in prompts]))
    backend = model.backend(embeds[0].device, embeds[0].dtype)
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        layout = Layout.of([len(row) for row in embeds])
        positions = torch.cat([torch.arange(len(row)) for row in embeds])[None]
        rotation = model.rope(positions, layout.rope_lengths[None], embeds[0].dtype)
        hidden = model.model(torch.cat(embeds)[None], rotation, backend, layout=layout)
        chosen = model.lm_head(hidden[0, layout.cu_seqlens[1:].long() - 1]).argmax(-1)
        new = model.model.embed_tokens(chosen)
        for i, token in enumerate(chosen.tolist()):
            answers[i].append(token)
            embeds[i] = torch.cat([embeds[i], new[i : i + 1]])
    return answers


def around(ours: Callable[[], list], other: Callable[[], list], rounds: int = 1) -> tuple[list[float], float, int]:
    """Ratios of processor seconds, other by ours: ours runs before and after each run of the other, and is taken once
    from either side. Also the median seconds of ours, and how many answers are the same."""

    def timed(run: Callable[[], list]) -> tuple[float, list]:
        began = time.process_time()
        found = run()
        return time.process_time() - began, found

    ratios, ours_s, same = [], [], 0
    for _ in range(rounds):
        (before_s, found), (other_s, others), (after_s, _) = timed(ours), timed(other), timed(ours)
        ratios += [other_s / before_s, other_s / after_s]
        ours_s += [before_s, after_s]
        same = sum(one == another for one, another in zip(found, others, strict=True))
    return ratios, median(ours_s), same


def cache(folder: Path) -> Figure:
    from phi3v_dist.evaluate.generate import generate
    from phi3v_dist.model import Phi3VForCausalLM

    model, prompts = Phi3VForCausalLM.from_pretrained(folder), prompts_of(folder)
    generate(model, prompts, 2, ())  # code is loaded
    ratios, seconds, same = around(
        lambda: [list(answer.ids) for answer in generate(model, prompts, NEW_TOKENS, ())],
        lambda: without_cache(model, prompts, NEW_TOKENS),
    )  # fmt: skip
    name = f"{NEW_TOKENS} new tokens, batch {BATCH}, with a cache"
    return Figure(name, f"{median(ratios):.1f} x", "≥ 5 x without", detail_of(ratios, seconds, same))


def batch(folder: Path) -> Figure:
    from phi3v_dist.evaluate.generate import generate
    from phi3v_dist.model import Phi3VForCausalLM

    model, prompts, num_tokens = Phi3VForCausalLM.from_pretrained(folder), prompts_of(folder), 128
    ratios, seconds, same = around(
        lambda: [answer.ids for answer in generate(model, prompts, num_tokens, ())],
        lambda: [generate(model, [prompt], num_tokens, ())[0].ids for prompt in prompts], rounds=3,
    )  # fmt: skip
    name = f"{num_tokens} new tokens, batch {BATCH} against {BATCH} times 1"
    return Figure(name, f"{median(ratios):.1f} x", "", detail_of(ratios, seconds, same))


def detail_of(ratios: list[float], seconds: float, same: int) -> str:
    spread = f"{min(ratios):.1f} to {max(ratios):.1f} x with ours before and after"
    return f"{seconds:.1f} s of a processor; {spread}; {same} of {BATCH} answers the same"


def prefill() -> Figure:
    """A process each: peak resident memory above the model, and processor seconds."""
    found = []
    for kind in ("sliced", "whole"):
        # Freed blocks of 1 MiB go back at once, so that resident memory is what is in use.
        fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
        environment = os.environ | fixed | {"MALLOC_TRIM_THRESHOLD_": str(MIB)}
        command = [sys.executable, __file__, kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    sliced, whole = found
    assert sliced["token"] == whole["token"], "it must be the same computation"
    peaks, seconds = sliced["peak_bytes"] / whole["peak_bytes"], sliced["seconds"] / whole["seconds"]
    detail = f"{sliced['peak_bytes'] / MIB:.0f} against {whole['peak_bytes'] / MIB:.0f} MiB above the model, "
    detail += f"{sliced['cache_bytes'] / MIB:.0f} MiB of each the cache; "
    detail += f"{sliced['seconds']:.0f} against {whole['seconds']:.0f} s of a processor"
    value = f"{peaks:.2f} x memory, {seconds:.2f} x time"
    return Figure(f"prefill of {LONG_PROMPT:,} tokens in slices against whole", value, "< 1 x memory", detail)


def prefill_once(kind: str) -> dict:
    """The prompt's first token, in this process; hidden 256, 4 layers, as long_rows.py has it."""
    from long_row_process import FOLDER, ids_of, resident

    from phi3v_dist.data.batch import Example
    from phi3v_dist.evaluate import generate as module
    from phi3v_dist.model import Phi3VForCausalLM
    from phi3v_dist.model.official_config import read_config
    from phi3v_dist.model.sources import RandomWeights

    torch.set_num_threads(1)
    config = read_config(FOLDER)
    weights = RandomWeights(config, seed=0)
    model = Phi3VForCausalLM.without_weights(config)
    model.take({name: weights.get(name) for name, _ in model.named_parameters()})
    none = torch.zeros(0, 2, dtype=torch.int64)

    def answer(num_tokens: int) -> int:
        ids = ids_of(num_tokens)
        prompt = Example(0, ids, torch.full_like(ids, -100), torch.zeros(0, 3, 336, 336), none)
        return module.generate(model, [prompt], 1, ())[0].ids[0]

    answer(64)  # code is loaded
    if kind == "whole":
        module.PREFILL_TOKENS = LONG_PROMPT
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    began = time.process_time()
    token = answer(LONG_PROMPT)
    seconds = time.process_time() - began
    cache_bytes = (
        2 * config["num_hidden_layers"] * (LONG_PROMPT + 1) * config["hidden_size"] * 4
    )  # as many heads of keys
    return {"peak_bytes": resident("VmHWM") - before, "seconds": seconds, "token": token, "cache_bytes": cache_bytes}


if __name__ == "__main__":
    print(json.dumps(prefill_once(sys.argv[1])), flush=True)
