"""config.json of a model folder → the official fields, or every one that is missing or impossible.

Surprise: it is kept as it is, a dictionary in the published form. transformers' own Phi3Config fails on it, and writes
another form, which the published code and serving engines refuse; so an export copies the file.
"""

import json
from pathlib import Path
from typing import Any

from phi3v_dist.errors import CheckpointError

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip
DEFAULT_PAD_ID = 32000  # the official class's default, which Phi-3-vision's config.json leaves unsaid


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, as it is.

    Raises:
        CheckpointError: no such file, or not a Phi-3-V's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `model.path` must be a folder in the official layout")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else config
    if kind != "phi3_v":
        raise CheckpointError(f"{path}: model_type is {kind!r}, not 'phi3_v'; this is another model")
    wrong = [
        f"{path}: `{key}` is {config.get(key, 'missing')}, but must be a whole number above 0"
        for key in SIZES
        if not isinstance(config.get(key), int) or config[key] < 1
    ]
    if not isinstance(config.get("img_processor"), dict):
        wrong.append(f"{path}: `img_processor` is missing, which names the vision tower")
    if not wrong:
        pad_id = config.get("pad_token_id", DEFAULT_PAD_ID)
        if pad_id is not None and not 0 <= pad_id < config["vocab_size"]:
            wrong.append(f"{path}: `pad_token_id` is {pad_id} (if unsaid, {DEFAULT_PAD_ID}), not in the vocabulary")
    if wrong:
        raise CheckpointError(wrong)
    return config


def head_dim(config: dict[str, Any]) -> int:
    """Width of one attention head."""
    return int(config["hidden_size"] // config["num_attention_heads"])
