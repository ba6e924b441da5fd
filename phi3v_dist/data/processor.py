"""`Sample` → `Example`: a conversation becomes token ids and labels, its pictures become crops.

Two ways in. `Phi3VProcessor(text, images)` is the published processor, exactly: special-token text in the prompt
becomes special tokens, crops are zero-filled to one count. `encode` and `encode_prompt` take structured turns, in which
words of the data stay words whatever they spell (chat.py), and keep real crops only, for training in the fast way of
crops.py where that is asked for. Surprise: `count` knows the length of an `Example` to the token from widths and
heights, so planning never decodes a picture.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast

from phi3v_dist.data.batch import Crops, Example
from phi3v_dist.data.chat import ANSWER_ROLE, ChatTokenizer
from phi3v_dist.data.crops import CropLayout, CropMode, Picture, write_crops, write_fast_crops
from phi3v_dist.data.fit import NO_LIMIT, FitPolicy, Fitted, fit
from phi3v_dist.data.samples import BadSample, Message, Sample
from phi3v_dist.errors import CheckpointError, ConfigError, DataError
from phi3v_dist.model.attention import IGNORE
from phi3v_dist.model.placement import CROP_SIZE
from phi3v_dist.model.vision import Normalization

# Part of `digest`: count up when the same turns come to give other ids, so that stored lengths are measured again.
ENCODING_VERSION = 2
_PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


class ExampleLength(NamedTuple):
    """What an `Example` will cost, known before a pixel is read.

    crops: real ones, global views included. full_tokens: before the fit policy cut anything; else equal to `tokens`.
    """

    tokens: int
    label_tokens: int
    crops: int
    full_tokens: int


class Phi3VProcessor:
    """Tokenizer, chat template and picture crops of Phi-3-vision. Threads may share it, but for calling it with text.

    num_crops: the greatest number of local crops per picture (16 in Phi-3-vision's own file, 4 in Phi-3.5's).
    normalization: what fast crops still need, from the model folder.
    stop_ids: ids at which generation stops: `<|end|>`, `<|endoftext|>`, `<|assistant|>`.
    digest: hexadecimal, of everything that decides the result of `count`; other processors have another one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        num_crops: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        fit_policy: FitPolicy = NO_LIMIT,
    ):
        """image_mean, image_std: of red, green and blue in 0..1. Errors as `from_pretrained`."""
        if num_crops < 1:
            raise ConfigError(f"num_crops is {num_crops}; a picture needs at least 1 local crop (16 and 4 are usual)")
        self.tokenizer = tokenizer
        self.num_crops = num_crops
        self.fit_policy = fit_policy
        self.normalization = Normalization.of(image_mean, image_std)
        self._chat = ChatTokenizer(tokenizer)
        self.stop_ids = self._chat.stop_ids
        decides_length = [ENCODING_VERSION, num_crops, fit_policy.digest, tokenizer.backend_tokenizer.to_str()]
        self.digest = hashlib.sha256(json.dumps(decides_length).encode()).hexdigest()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, num_crops: int | None = None, fit_policy: FitPolicy = NO_LIMIT
    ) -> "Phi3VProcessor":
        """Reads tokenizer.json, tokenizer_config.json and preprocessor_config.json of a model folder.

        Args:
            num_crops: None takes the number in preprocessor_config.json.
            fit_policy: what `count`, `encode` and `encode_prompt` do with turns longer than a row; default: nothing.

        Raises:
            CheckpointError: a file or one of its entries is missing, or the tokenizer is not of Phi-3's kind.
            ConfigError: `num_crops` is less than 1.
        """
        folder = Path(folder)
        names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"cannot load the processor: {', '.join(missing)} not found in {folder}; "
                "name a folder with the files of Phi-3-vision, or one of our exports"
            )
        path = folder / "preprocessor_config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            mean, std, default_num_crops = (settings[key] for key in ("image_mean", "image_std", "num_crops"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"cannot load the processor: {path} is not JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"cannot load the processor: {path} has no entry {error}") from error
        if not isinstance(default_num_crops, int):
            raise CheckpointError(
                f"cannot load the processor: {path}: num_crops is {default_num_crops!r}, not a number"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, default_num_crops if num_crops is None else num_crops, mean, std, fit_policy)

    def __call__(
        self, text: str, images: Picture | Sequence[Picture] | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """The published processor's output for one prompt.

        Args:
            text: with `<|image_1|>` … `<|image_N|>`, in any order, where the pictures go.

        Returns:
            `input_ids` and `attention_mask` int64 [1, tokens]; with pictures also `pixel_values` fp32
            [N, num_crops + 1, 3, 336, 336] (zeros after the real crops), `image_sizes` int64 [N, 2] (padded height,
            width) and `num_img_tokens`, a list.

        Raises:
            DataError: placeholders and pictures do not match, or a picture cannot be cut.
        """
        if return_tensors != "pt":
            raise ConfigError(f"return_tensors={return_tensors!r}: the processor makes PyTorch tensors only, use 'pt'")
        if images is None:
            pictures: list[Picture] = []
        else:
            pictures = [images] if isinstance(images, Image.Image | np.ndarray) else list(images)
        chunks = _PLACEHOLDER.split(text)  # text, number, text, number, …, text
        numbers = [int(number) for number in chunks[1::2]]
        if sorted(numbers) != list(range(1, len(pictures) + 1)):
            found = ", ".join(f"<|image_{number}|>" for number in numbers) or "none"
            raise DataError(
                f"the prompt's placeholders do not match its {len(pictures)} pictures: each of <|image_1|> to "
                f"<|image_N|>, N the number of pictures, must stand in it once; found {found}"
            )
        layouts = [self._layout(picture) for picture in pictures]
        ids: list[int] = list(self.tokenizer(chunks[0]).input_ids)
        for number, chunk in zip(numbers, chunks[2::2], strict=True):
            ids += [-number] * layouts[number - 1].num_tokens
            ids += self.tokenizer(chunk).input_ids
        input_ids = torch.tensor([ids])
        output: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if pictures:
            pixel_values = torch.zeros(len(pictures), self.num_crops + 1, 3, CROP_SIZE, CROP_SIZE)
            for picture, layout, crops in zip(pictures, layouts, pixel_values, strict=True):
                write_crops(picture, layout, self.normalization, crops[: layout.num_crops])
            output["pixel_values"] = pixel_values
            output["image_sizes"] = torch.tensor([layout.padded_hw for layout in layouts])
            output["num_img_tokens"] = [layout.num_tokens for layout in layouts]
        return BatchFeature(output)

    def encode(self, sample: Sample, crops: CropMode = "exact", out: Crops | None = None) -> Example:
        """The whole conversation, every answer and the `<|end|>` after it learned.

        Pictures are numbered as they are read; one that no turn shows is left out. `fast` crops are uint8.

        Args:
            out: where to write the crops, as many as the pictures have; None: to fresh memory.

        Raises:
            BadSample: naming shard and key, for the reasons of `count`, or because the crops are not as many as `out`
                takes, which is then untouched.
        """
        try:
            pictures, fitted = self._fit(sample.messages, sample.images)
            return self._example(sample.sample_id, fitted.ids, fitted.labels, pictures, fitted.layouts, crops, out)
        except DataError as error:
            raise BadSample(sample.shard, sample.key, str(error)) from error

    def encode_prompt(self, messages: Sequence[Message], images: Sequence[Picture], sample_id: int = -1) -> Example:
        """What the model is given to answer: everything through the opening of the assistant's turn, no labels.

        A final assistant turn is the answer asked for and is left out, so the prompt of a training conversation is the
        beginning of its `encode`. sample_id: -1 for a prompt that comes from no shard. Raises DataError as `count`.
        """
        pictures, fitted = self._fit(messages, images)
        has_answer = bool(messages) and messages[-1].role == ANSWER_ROLE
        asked = fitted.messages[:-1] if has_answer else fitted.messages
        num_shown = len(_shown(asked, len(images)))
        pictures, layouts = pictures[:num_shown], fitted.layouts[:num_shown]
        ids, _ = self._chat.ids_and_labels(asked, fitted.image_tokens[:num_shown], prompt=True)
        return self._example(sample_id, ids, [IGNORE] * len(ids), pictures, layouts)

    def learned_texts(self, messages: Sequence[Message]) -> list[list[str]]:
        """By answer, the text of each token that carries a label; see `ChatTokenizer.learned_texts`."""
        return self._chat.learned_texts(messages)

    def count(self, messages: Sequence[Message], image_sizes_wh: Sequence[tuple[int, int]]) -> ExampleLength:
        """The length of `encode` of the same turns, from each picture's (width, height) alone.

        Raises:
            DataError: an unknown role, a picture that does not exist, is shown twice or cannot be cut, text that is
                not Unicode.
        """
        sizes_wh = [image_sizes_wh[index] for index in _shown(messages, len(image_sizes_wh))]
        fitted = fit(messages, sizes_wh, self.num_crops, self._chat, self.fit_policy)
        label_tokens = len(fitted.labels) - fitted.labels.count(IGNORE)
        num_crops = sum(layout.num_crops for layout in fitted.layouts)
        return ExampleLength(len(fitted.ids), label_tokens, num_crops, fitted.full_tokens)

    def crops_of(self, image: Picture, crops: CropMode = "exact") -> tuple[Crops, tuple[int, int]]:
        """Real crops (global view first, then row by row) and the padded picture's (height, width) in pixels."""
        layout = self._layout(image)
        return self._crops([image], [layout], crops), layout.padded_hw

    def _fit(self, messages: Sequence[Message], images: Sequence[Picture]) -> tuple[list[Picture], Fitted]:
        """The pictures in reading order, and the turns as the fit policy leaves them."""
        pictures = [images[index] for index in _shown(messages, len(images))]
        sizes_wh = [_size_wh(picture) for picture in pictures]
        return pictures, fit(messages, sizes_wh, self.num_crops, self._chat, self.fit_policy)

    def _example(
        self, sample_id: int, ids: list[int], labels: list[int], pictures: Sequence[Picture],
        layouts: Sequence[CropLayout], crops: CropMode = "exact", out: Crops | None = None,
    ) -> Example:  # fmt: skip
        return Example(
            sample_id=sample_id,
            input_ids=_int64(ids),
            labels=_int64(labels),
            pixel_values=self._crops(pictures, layouts, crops, out),
            image_sizes=_int64([layout.padded_hw for layout in layouts]).view(-1, 2),
        )

    def _layout(self, image: Picture) -> CropLayout:
        return CropLayout.of(*_size_wh(image), self.num_crops)

    def _crops(
        self, pictures: Sequence[Picture], layouts: Sequence[CropLayout], mode: CropMode, out: Crops | None = None
    ) -> Crops:
        num_crops = [layout.num_crops for layout in layouts]
        if out is None:
            dtype = torch.uint8 if mode == "fast" else torch.float32
            out = torch.empty(sum(num_crops), 3, CROP_SIZE, CROP_SIZE, dtype=dtype)
        elif len(out) != sum(num_crops):
            raise DataError(f"it has {sum(num_crops)} crops, the plan says {len(out)}; delete its lengths file")
        for picture, layout, crops in zip(pictures, layouts, out.split(num_crops), strict=True):
            if mode == "fast":
                write_fast_crops(picture, layout, crops)
            else:
                write_crops(picture, layout, self.normalization, crops)
        return out


def _int64(numbers: Sequence[Any]) -> Int[Tensor, "..."]:
    """`torch.tensor` takes ten times as long over a list: for a picture's tokens, a tenth of its decoding."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def _size_wh(image: Picture) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _shown(messages: Sequence[Message], num_images: int) -> list[int]:
    """Indexes of the pictures in reading order, in which the model takes their features: whatever their numbers."""
    shown = [part for message in messages for part in message.parts if isinstance(part, int)]
    if unknown := [index for index in shown if not 0 <= index < num_images]:
        raise DataError(f"a turn shows picture {unknown[0]} (counted from 0), but the sample has {num_images} pictures")
    if twice := [index for index in shown if shown.count(index) > 1]:
        raise DataError(
            f"picture {twice[0]} (counted from 0) is shown {shown.count(twice[0])} times; the model was made for "
            "pictures that each stand in one place: store it twice, or show it once"
        )
    return shown
