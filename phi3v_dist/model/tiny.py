"""A folder in the official layout, small enough to train on a laptop.

What comes in: sentences for its tokenizer, and a seed. What goes out: config.json, tokenizer, preprocessor settings and
random safetensors, read by the very code that reads the real model. Surprise: even CLIP's untrained last layer is
there, because an export must be as complete as the official folder.

The architecture is the official one; only sizes differ (the picture side is real: 336-pixel crops of 24 x 24 patches,
so token counts are those of the real model). The tokenizer is a byte-fallback BPE with the official special tokens.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from phi3v_dist.model.sources import RandomWeights
from phi3v_dist.model.weights import write_safetensors

SPACE = "\u2581"  # how Llama's tokenizers write a space
WORDS = 1500  # learned pieces; every other text falls back to bytes
# (text, swallows the white space after it): as in the official tokenizer.json
SPECIAL_TOKENS = (
    ("<|endoftext|>", False), ("<|assistant|>", True), ("<|system|>", False), ("<|end|>", False), ("<|user|>", False),
    ("<|image|>", True),
)  # fmt: skip
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1}
DECODER = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
NUM_CROPS = 4
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]


def write_tiny(folder: Path, sentences: Iterable[str], seed: int = 0, **sizes: dict[str, int]) -> int:
    """Write the folder; returns the number of parameters. The same arguments give the same bytes.

    Args:
        sizes: `clip` and `decoder` may replace the numbers of `CLIP` and `DECODER`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(sentences)
    config = _config(tokenizer, CLIP | sizes.get("clip", {}), DECODER | sizes.get("decoder", {}))
    _write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
    _write_json(folder / "tokenizer_config.json", names | more)
    crops = {"num_crops": NUM_CROPS, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "num_img_tokens": 144}
    _write_json(folder / "preprocessor_config.json", crops)
    stop = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    ends = {"bos_token_id": 1, "eos_token_id": stop, "pad_token_id": stop[0]}
    _write_json(folder / "generation_config.json", ends)
    weights = RandomWeights(config, seed)
    write_safetensors(folder, weights)
    return sum(math.prod(weights.shape(name)) for name in weights.names)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tokenizer(sentences: Iterable[str]) -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    trained.normalizer = normalizers.Sequence(spaces)
    # Only while training: pieces stay inside a word, and a digit is always a piece of its own, as in the real one.
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPACE), "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    first = ["<unk>", "<s>", "</s>", *byte_tokens]
    alphabet = [SPACE, *map(chr, range(0x21, 0x7F))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + WORDS, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(sentences, trainer)
    state = json.loads(trained.to_str())
    state["pre_tokenizer"], state["added_tokens"] = None, []
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(t, rstrip=strip, normalized=False) for t, strip in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _config(tokenizer: Tokenizer, clip: dict[str, int], decoder: dict[str, int]) -> dict[str, Any]:
    """config.json in the official form; sizes apart, what the real one says."""
    half = decoder["hidden_size"] // decoder["num_attention_heads"] // 2
    # The real lists rise from 1.0 (short: to 3, long: to 65); these do the same over fewer frequencies.
    short = [round(3 ** (i / (half - 1)), 4) for i in range(half)]
    long = [round(65 ** (i / (half - 1)), 4) for i in range(half)]
    return {
        "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", **decoder,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "initializer_range": 0.02, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 131072,
        "rope_theta": 10000.0, "rope_scaling": {"type": "su", "short_factor": short, "long_factor": long},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float32",
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {
            "name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336",
            "image_dim_out": clip["hidden_size"], "num_img_tokens": 144, "clip_config": clip,
        },
    }  # fmt: skip
