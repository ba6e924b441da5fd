"""Pictures and a question → the answer of a saved model.

What comes in: picture files, words, and a `SavedModel`. What goes out: a `Reply`. Surprise: words are plain text, as
in training, whatever they spell, so a prompt with `<|image_1|>` or `<|end|>` in it would silently mean something else
than its writer thinks, and is refused. Pictures stand before the words, in the order in which they are named, and are
repaired as those of a shard are (turned upright, transparency laid on white, …).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from phi3v_dist.data.batch import Example
from phi3v_dist.data.pictures import PICTURE_ERRORS, decode_image
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.evaluate.generate import generate
from phi3v_dist.evaluate.sampling import GREEDY, Sampling
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.saved import SavedModel

_SPECIAL = re.compile(r"<\|[^|\s]*\|>")


@dataclass(frozen=True)
class Reply:
    """stopped: the model ended its answer by itself; else it was cut after `num_tokens`."""

    text: str
    num_tokens: int
    stopped: bool


def predict(
    saved: SavedModel, pictures: Sequence[Path], prompt: str, max_new_tokens: int, sampling: Sampling = GREEDY,
    device: torch.device | None = None,
) -> Reply:  # fmt: skip
    """Ask one question. The model is read last, when nothing else is wrong.

    Raises:
        ConfigError: there is no prompt, it spells special tokens, or it leaves no room for the answer.
        DataError: a picture cannot be used.
        CheckpointError: the model cannot be read.
    """
    problems = _prompt_problems(prompt)
    if max_new_tokens < 1:
        problems.append(f"--max_new_tokens is {max_new_tokens}: an answer has at least 1 token")
    if problems:
        raise ConfigError(problems)
    processor = Phi3VProcessor.from_pretrained(saved.files, saved.num_crops)
    images = read_pictures(pictures)
    try:
        example = processor.encode_prompt([Message("user", (*range(len(images)), prompt))], images)
    except DataError as error:
        raise DataError(f"the question cannot be asked: {error}") from error
    _require_room(example, max_new_tokens, read_config(saved.files)["max_position_embeddings"])
    model = saved.load().to(device or torch.device("cpu"))
    (answer,) = generate(model, [example], max_new_tokens, processor.stop_ids, sampling)
    return Reply(str(processor.tokenizer.decode(list(answer.ids))).strip(), len(answer.ids), answer.stopped)


def read_pictures(paths: Sequence[Path]) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """The pictures, repaired. Raises DataError naming every one that cannot be used."""
    images, problems = [], []
    for number, path in enumerate(paths, start=1):
        try:
            images.append(decode_image(path.read_bytes()))
        except FileNotFoundError:
            problems.append(f"picture {number}, {path}: no such file")
        except PICTURE_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            problems.append(f"picture {number}, {path}: not a readable picture: {reason}")
    if problems:
        raise DataError(problems)
    return images


def _prompt_problems(prompt: str) -> list[str]:
    if not prompt.strip():
        return ["--prompt is empty: say what you want to know"]
    return [
        f"--prompt holds {token}: the words of a prompt are plain text, as in training, and the chat's own tokens are "
        "put around them for you. Leave it out; pictures stand before the words, in the order of --predict"
        for token in dict.fromkeys(_SPECIAL.findall(prompt))
    ]


def _require_room(example: Example, max_new_tokens: int, context_tokens: int) -> None:
    num_tokens = len(example.input_ids)
    room = context_tokens - num_tokens
    if room >= max_new_tokens:
        return
    num_image_tokens = int((example.input_ids < 0).sum())
    way_out = f"ask for at most {room:,} with --max_new_tokens" if room > 0 else "ask about fewer pictures or words"
    raise ConfigError(
        f"the question takes {num_tokens:,} tokens ({num_image_tokens:,} of them its pictures) and the answer up to "
        f"{max_new_tokens:,}, but the model's context ends at {context_tokens:,}: {way_out}"
    )
