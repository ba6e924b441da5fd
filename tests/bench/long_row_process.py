"""One forward and backward pass in a process of its own → peak resident memory above what was there before, seconds.

    python long_row_process.py stock 4096                   transformers' Phi-3: full logits, no slices
    python long_row_process.py ours 4096                    one rank
    RANK=0 WORLD_SIZE=2 … python long_row_process.py ours 4096      ranks that share the row (torchrun's variables)
    python long_row_process.py head-stock|head-ours 32768   head and loss alone

Prints one line of JSON. Both models recompute each layer in the backward pass and have the same weights; documents
have 4,096 tokens, the last one the rest, as rows of a batch for transformers and one after another for us. Weights and
gradients exist before the measurement begins. Freed blocks of 1 MiB go back at once (long_rows.py sees to it), so that
resident memory is what is in use.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from phi3v_dist.data.batch import Example, Filling, Row, collate
from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.loss import Head
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.sources import RandomWeights
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.parallel.ulysses import SequenceGroup

DOCUMENT, VOCABULARY, HIDDEN = 4096, 32064, 256
CHUNK_TOKENS = 1024
FOLDER = Path(__file__).parent / "long_row_model"  # config.json alone


def ids_of(num_tokens: int) -> Tensor:
    return torch.randint(3, 32000, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


def documents(num_tokens: int) -> list[Tensor]:
    return list(ids_of(num_tokens).split(DOCUMENT))


def stock(config: dict):
    """transformers' own model with the weights of ours."""
    from transformers import Phi3Config, Phi3ForCausalLM

    scaling = {**config["rope_scaling"], "type": "longrope", "rope_type": "longrope"}
    fields = {name: config[name] for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "rms_norm_eps",
    )}  # fmt: skip
    phi3 = Phi3Config(**fields, rope_scaling=scaling, pad_token_id=None, sliding_window=None, use_cache=False)
    model = Phi3ForCausalLM(phi3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = RandomWeights(config, seed=0)
    model.load_state_dict({name: weights.get(name) for name in model.state_dict()})

    def losses(num_tokens: int) -> Tensor:
        total = torch.zeros(())
        rows = documents(num_tokens)
        batches = [torch.stack([row for row in rows if len(row) == n]) for n in dict.fromkeys(map(len, rows))]
        for ids in batches:
            total = total + model(input_ids=ids, labels=ids).loss * (ids.numel() - len(ids))
        return total

    return model, losses


def ours(config: dict):
    """Our model; with more than one process, each has its slice."""
    topology = Topology.from_environment()
    if topology.world_size > 1:
        topology.start(600)
    group = SequenceGroup.form(topology, topology.world_size)
    weights = RandomWeights(config, seed=0)
    model = Phi3VForCausalLM.without_weights(config)
    model.take({name: weights.get(name) for name, _ in model.named_parameters()}).train()
    model.set_gradient_checkpointing(True, vision_chunk_crops=16, mlp_chunk_tokens=CHUNK_TOKENS)
    no_picture = (torch.zeros(0, 3, 336, 336), torch.zeros(0, 2, dtype=torch.int64))

    def losses(num_tokens: int) -> Tensor:
        parts = tuple(Example(i, ids, ids.clone(), *no_picture) for i, ids in enumerate(documents(num_tokens)))
        batch = collate(Row(parts or (Filling(8),)), pad_id=0, sequence=group)
        return model(**batch.inputs(torch.device("cpu"))).token_losses.sum()

    return model, losses


def head(kind: str):
    """Head and loss alone."""
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)) * 0.02
    module = Head(HIDDEN, VOCABULARY, bias=False)
    module.weight.data.copy_(weight)

    def losses(num_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(num_tokens)
        hidden = torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_()
        if kind == "head-ours":
            return module(hidden, ids_of(num_tokens)).sum()
        return F.cross_entropy(F.linear(hidden, module.weight).float(), ids_of(num_tokens), reduction="sum")

    return module, losses


def resident(field: str) -> int:
    """Bytes, from /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    kind, num_tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    config = read_config(FOLDER)
    model, losses = head(kind) if kind.startswith("head") else (stock if kind == "stock" else ours)(config)
    losses(64).backward()  # gradients exist, and code is loaded
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    began = time.perf_counter()
    loss = losses(num_tokens)
    loss.backward()
    seconds = time.perf_counter() - began
    print(json.dumps({"peak_bytes": resident("VmHWM") - before, "seconds": seconds, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main()
