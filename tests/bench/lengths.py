"""A seeded mix of lengths that is hard to pack: pictures come in lumps of 2,000 tokens, documents have a long tail.

What comes in: a number of samples and a seed. What goes out: `Lengths`, and a `ShardTable` without files over them. It
follows the mix that the design's figures were measured on: 20,000 samples, 54 % of the tokens are image tokens, 59 %
in long documents, median 2.6 thousand tokens, 99 % below 108 thousand (`summary` says what comes out here).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.shards import ShardTable

NUM_CROPS = 16
CHAT_TOKENS = 14  # roles and ends of a question and an answer
MULTI_IMAGE_FRAC, LONG_FRAC = 0.15, 0.05


def long_tailed(num_samples: int = 20_000, seed: int = 0) -> tuple[Lengths, np.ndarray]:
    """Lengths, and how many of each sample's tokens stand for pictures.

    Four of five samples are a picture and a text of about 150 tokens; 15 % show 2 to 5 pictures; 5 % are documents of
    20 to 100 thousand tokens with up to 20 pictures.
    """
    rng = np.random.default_rng(seed)
    kind = rng.random(num_samples)
    is_long, is_multi = kind < LONG_FRAC, (kind >= LONG_FRAC) & (kind < LONG_FRAC + MULTI_IMAGE_FRAC)
    text = rng.lognormal(np.log(150), 0.6, num_samples).astype(int) + CHAT_TOKENS
    text[is_long] = rng.integers(20_000, 100_001, is_long.sum())
    num_images = np.ones(num_samples, int)
    num_images[is_multi] = rng.integers(2, 6, is_multi.sum())
    num_images[is_long] = rng.integers(0, 21, is_long.sum())
    sizes_wh = rng.integers(400, 1601, (int(num_images.sum()), 2))
    layouts = [CropLayout.of(int(width), int(height), NUM_CROPS) for width, height in sizes_wh]
    owner = np.repeat(np.arange(num_samples), num_images)
    image_tokens = np.bincount(owner, [layout.num_tokens for layout in layouts], num_samples).astype(np.int32)
    crops = np.bincount(owner, [layout.num_crops for layout in layouts], num_samples).astype(np.int32)
    tokens = (text + image_tokens).astype(np.int32)
    return Lengths(tokens, (text // 2).astype(np.int32), crops, tokens, {}), image_tokens


def summary(lengths: Lengths, image_tokens: np.ndarray) -> dict[str, float]:
    """What the design says about its own mix, of this one."""
    tokens = lengths.tokens.astype(np.int64)
    is_long = lengths.label_tokens > 8000
    left_out = {f"above {limit:,}": float((tokens > limit).mean()) for limit in (8192, 32_768, 131_072)}
    return {
        "image tokens": float(image_tokens.sum() / tokens.sum()),
        "in long documents": float(tokens[is_long].sum() / tokens.sum()),
        "median": float(np.median(tokens)),
        "p99": float(np.quantile(tokens, 0.99)),
    } | left_out


def table_of(sizes: Sequence[int] | np.ndarray, weights: Sequence[float | None] = (None,)) -> ShardTable:
    """Shards with so many samples, without files, dealt out to the sources one after another."""
    sources = tuple(SourceSettings(shards=["x.tar"], weight=weight) for weight in weights)
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    source_of_shard = np.arange(len(sizes)) * len(sources) // len(sizes)
    return ShardTable(sources, (Path("x.tar"),) * len(sizes), start, source_of_shard)
