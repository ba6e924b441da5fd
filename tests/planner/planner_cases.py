"""Models, rows and ds_configs on which the planner is compared with the engine, and what the planner says of them."""

from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import ModelSettings, TrainSettings
from phi3v_dist.planner.memory import Memory, memory, owners
from phi3v_dist.planner.row import RowShape, timeline
from phi3v_dist.planner.zero_share import zero_share

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], int]


def model(hidden: int, layers: int, vocab: int = 2048, heads: int = 4, clip_layers: int = 3) -> dict[str, Any]:
    half = hidden // heads // 2
    return {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "pad_token_id": 0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_scaling": {"type": "su", "short_factor": [1.0] * half, "long_factor": [2.0] * half},
        "img_processor": {"clip_config": {"hidden_size": 64, "intermediate_size": 128,
                                          "num_hidden_layers": clip_layers, "num_attention_heads": 2}},
    }  # fmt: skip


def ds_config(ranks: int, hidden: int, sequence: int = 1, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    """As `zero.resolve` makes it of ds_configs/zero3.json."""
    sizes = {"reduce_bucket_size": hidden**2, "stage3_prefetch_bucket_size": hidden**2 * 9 // 10,
             "stage3_param_persistence_threshold": 10 * hidden}  # fmt: skip
    return {
        "train_batch_size": ranks, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0, "bf16": {"enabled": bf16}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "steps_per_print": 1000000000,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True} | sizes | zero,
    }  # fmt: skip


def cases(ranks: int) -> dict[str, Case]:
    """Different in shape, row length, checkpointing, what is trained, limits, and ranks that share a row."""
    on, off = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
    picture, wide = [336, 336], [336, 672]
    little = {"stage3_max_live_parameters": 1000000, "stage3_max_reuse_distance": 500000}
    large = {"reduce_bucket_size": 3000000, "stage3_prefetch_bucket_size": 2000000}
    lora = {"parts": {"text": "lora", "vision": "frozen", "projector": "full"}, "lora": {"rank": 4}}
    chunks = on | {"mlp_chunk_tokens": 256, "vision_chunk_crops": 2}

    def row(*documents: int, labels: int = 400, images: Any = (), chunks: int = 1) -> dict[str, Any]:
        return {"documents": documents, "label_tokens": labels, "images": images, "num_chunks": chunks}

    return {
        "layers checkpointed": (model(256, 4), on, {}, row(1024, images=[picture]), ds_config(ranks, 256), 1),
        "nothing checkpointed, few live weights": (
            model(256, 4), off, {}, row(300, 200), ds_config(ranks, 256, **little), 1),
        "slices, shared by two": (
            model(256, 4), chunks, {}, row(1500, 500, images=[wide, picture], chunks=2), ds_config(ranks, 256), 2),
        "deep, large buckets": (model(128, 8), on, {}, row(700, 60, 40), ds_config(ranks, 128, **large), 1),
        "adapters, frozen pictures": (model(256, 3), on, lora, row(1400, images=[wide]), ds_config(ranks, 256), 1),
        "bf16, shared by two": (model(192, 5, 4096, 6), off, {}, row(1000), ds_config(ranks, 192, bf16=True), 2),
    }  # fmt: skip


def predicted(case: Case) -> Memory:
    """What the planner says, without what only a GPU has."""
    config, model_words, train_words, row, zero, sequence = case
    settings, train = ModelSettings(path=Path("none"), **model_words), TrainSettings(steps=1, **train_words)
    dtype = torch.bfloat16 if zero["bf16"]["enabled"] else torch.float32
    held_by = owners(config, settings, train)
    weights = [weight for own in held_by.values() for weight in own]
    share = zero_share(weights, zero, zero["train_batch_size"], dtype.itemsize)
    images = tuple(map(tuple, row["images"]))
    shape = RowShape(tuple(row["documents"]), row["label_tokens"], images, row["num_chunks"])
    return memory(timeline(config, settings, train, shape, dtype, sequence), held_by, share, unseen={})
