"""What the original script's ways come to, beside ours: the figures of docs/original.md.

python tests/original_points.py launch/configs/quickstart.yaml models/Phi-3-vision-128k-instruct --retrain

What comes in: the configuration of a finished and exported run of the recipe (make train), and a folder with the real
tokenizer's files. What goes out: one line a figure. `--retrain` trains a model from random weights as the original
does, on the same products (minutes). Surprise: nothing of the original is run or kept here. Its habits are few enough
to be said again, over our own parts, whose equality with the published model is shown elsewhere (make golden).
"""

import argparse
import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate, random_split

from phi3v_dist import config
from phi3v_dist.data.batch import Example, Row, collate
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message, Sample
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.observe.tracker import read_metrics
from phi3v_dist.run import Data

# How the original writes a product; microsoft/Phi-3CookBook, code/04.Finetuning/Phi-3-vision-Trainingscript.py, 54d670b
ASKED = "<|user|>\n<|image_1|>What is shown in this image?<|end|><|assistant|>\n"
TAG = "<|image_1|>"
LENGTH_TOKENS = 512
PRODUCTS, TRAIN_FRAC, ACCUMULATION, LEARNING_RATE = 3040, 0.9, 64, 5e-5
NUM_STEPS = int(TRAIN_FRAC * PRODUCTS) // ACCUMULATION  # of its one epoch
ROWS, WARMUP_STEPS, PEAK = 16, 20, 2e-3  # of --retrain: products a step and the rates of the quickstart
MAX_NEW_TOKENS = 48

Figures = dict[str, float | str]


def price_of(words: str) -> float:
    """As the original reads it: the last word, and 0 when that is no number."""
    with contextlib.suppress(ValueError, IndexError):
        return float(words.split()[-1].replace(",", ""))
    return 0.0


def answer_to(product: Mapping[str, Any]) -> str:
    return "Product: {title}, Category: {category3_code}, Full Price: {full_price}<|end|>".format_map(product)


def text_of(tokenizer: Any, product: Mapping[str, Any]) -> list[int]:
    """Ids of one product as the original trains it, without the padding that fills its row up."""
    return list(tokenizer(ASKED + answer_to(product), truncation=True, max_length=LENGTH_TOKENS).input_ids)


def tag_points(processor: Phi3VProcessor, sample: Sample) -> Figures:
    """What the picture's place is made of."""
    tokenizer = processor.tokenizer
    theirs = tokenizer(ASKED).input_ids
    ours = processor.encode_prompt(sample.messages, sample.images).input_ids.tolist()
    same = next(i for i, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other)
    return {
        "tag, pieces": " ".join(tokenizer.convert_ids_to_tokens(tokenizer(TAG, add_special_tokens=False).input_ids)),
        "tag, places for the picture: original": sum(i < 0 for i in theirs),
        "tag, places for the picture: here": sum(i < 0 for i in ours),
        "prompt, tokens: original": len(theirs),
        "prompt, tokens: here": len(ours),
        "prompt, first tokens that agree": same,
    }


def loss_points(processor: Phi3VProcessor, products: Sequence[Mapping[str, Any]]) -> Figures:
    """What the mean loss is a mean of, over the original's targets: all ids but the first."""
    opening = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    targets = LENGTH_TOKENS - 1
    texts = [text_of(processor.tokenizer, product) for product in products]
    length = fmean(map(len, texts))
    answer = fmean(len(ids) - 1 - ids.index(opening) for ids in texts)
    turns = [(Message("assistant", (answer_to(product).removesuffix("<|end|>"),)),) for product in products]
    return {
        "row, tokens of text": length,
        "loss, share of padding": (targets - length) / targets,
        "loss, share of the prompt": (length - answer) / targets,
        "loss, share of the answer": answer / targets,
        "loss, tokens of the answer: original": answer,
        "loss, tokens of the answer: here": fmean(processor.count(turn, []).label_tokens for turn in turns),
    }


def gradient_points(model: Phi3VForCausalLM, processor: Phi3VProcessor, example: Example, text: list[int]) -> Figures:
    """Which share of the tower and the projector a step would move."""
    figures: Figures = {}
    pad_id = processor.tokenizer.pad_token_id
    inputs = collate(Row((example,)), pad_id).inputs(torch.device("cpu"))
    losses = {
        "original": lambda: original_loss(model, [text], pad_id)[0],
        "here": lambda: model(**inputs).token_losses.sum(),
    }
    model.requires_grad_(True)
    for name, loss in losses.items():
        model.zero_grad(set_to_none=True)
        loss().backward()
        sees = [p for n, p in model.named_parameters() if "vision_embed_tokens" in n]
        moved = sum(p.numel() for p in sees if p.grad is not None and bool(p.grad.any()))
        figures[f"vision, share with a gradient: {name}"] = moved / sum(p.numel() for p in sees)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return figures


def original_loss(
    model: Phi3VForCausalLM, texts: Sequence[Sequence[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over all targets of rows filled up on the left, every id a label; and the losses of the texts' own.

    The attention mask hides the padding from the text, so it is a document of its own; of several rows' the longest is
    computed once and counts as often as rows have it, since what a causal model says of its beginning is the same.
    """
    num_padding = [LENGTH_TOKENS - len(text) for text in texts]
    documents = [[pad_id] * max(num_padding), *texts]
    ids = torch.tensor([[i for document in documents for i in document]])
    places = torch.tensor([[i for document in documents for i in range(len(document))]])
    losses = model(ids, position_ids=places, labels=ids).token_losses
    of_padding, of_texts = losses.split([max(num_padding) - 1, len(losses) - max(num_padding) + 1])
    times = (torch.arange(max(num_padding) - 1)[:, None] < torch.tensor(num_padding) - 1).sum(1)
    return ((of_padding * times).sum() + of_texts.sum()) / (len(texts) * (LENGTH_TOKENS - 1)), of_texts


@torch.inference_mode()
def teacher_forced(model: Phi3VForCausalLM, example: Example, tokenizer: Any) -> str:
    """The likeliest token at each place of the answer, every one with the true ones before it."""
    batch = collate(Row((example,)), tokenizer.pad_token_id)
    logits = model(**batch.inputs(torch.device("cpu")), return_logits=True).logits[0]
    learned = (example.labels != -100).nonzero().flatten()
    return str(tokenizer.decode(logits[learned - 1].argmax(-1), skip_special_tokens=True))


def forced_points(model: Phi3VForCausalLM, processor: Phi3VProcessor, samples: Sequence[Sample]) -> Figures:
    """The price error of the same model, with the true digits in the context; also with another product's picture."""
    examples = [processor.encode(sample) for sample in samples]
    half = len(examples) // 2
    others = examples[half:] + examples[:half]
    prices = [float(sample.fields["full_price"]) for sample in samples]
    errors: dict[str, list[float]] = {"seeing": [], "blind": []}
    for example, other, price in zip(examples, others, prices, strict=True):
        if torch.equal(example.image_sizes, other.image_sizes):
            shown = {"seeing": example, "blind": replace(example, pixel_values=other.pixel_values)}
            for name, one in shown.items():
                errors[name].append(abs(price_of(teacher_forced(model, one, processor.tokenizer)) - price))
    return {f"price error, true digits in the context: {name}": fmean(found) for name, found in errors.items()}


def retrained(folder: Path, products: Sequence[Mapping[str, Any]], steps: int, tokenizer: Any) -> Phi3VForCausalLM:
    """A model trained the original's way on as many products a step, at the rates of the quickstart."""
    torch.manual_seed(0)
    model = Phi3VForCausalLM.from_pretrained(folder).train()
    # The tiny model's row for padding is 0 and stays so: no layer could learn anything there. The real model's is not.
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[tokenizer.pad_token_id], std=0.02)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rows = [text_of(tokenizer, product) for product in products]
    order = _shuffled(len(rows), steps * ROWS)
    for step in range(steps):
        chosen = [rows[i] for i in order[step * ROWS : (step + 1) * ROWS]]
        loss, _ = original_loss(model, chosen, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def _rate(step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / WARMUP_STEPS)
    return rising * (0.55 + 0.45 * math.cos(math.pi * step / steps))  # to a tenth of the peak


def _shuffled(num_rows: int, wanted: int) -> list[int]:
    epochs = [torch.randperm(num_rows) for _ in range(-(-wanted // num_rows))]
    return torch.cat(epochs)[:wanted].tolist()


@torch.inference_mode()
def retrained_points(model: Phi3VForCausalLM, products: Sequence[Mapping[str, Any]], tokenizer: Any) -> Figures:
    """What the original would report of that model, and what the model says when it is asked."""
    opening = tokenizer.convert_tokens_to_ids("<|assistant|>")
    answer = price_of(said := greedy(model, tokenizer))
    shown = []
    for product in products:
        ids = text_of(tokenizer, product)
        loss, of_text = original_loss(model, [ids], tokenizer.pad_token_id)
        words = tokenizer.decode(model(torch.tensor([ids])).logits[0].argmax(-1), skip_special_tokens=True)
        price, found = float(product["full_price"]), price_of(words)
        of_answer = of_text[ids.index(opening) :].mean()
        shown.append((abs(found - price), found == 0, abs(answer - price), float(loss), float(of_answer)))
    forced, unread, generated, loss, loss_of_answer = (fmean(part) for part in zip(*shown, strict=True))
    return {
        "retrained, price error it reports": forced,
        "retrained, share of prices read as 0": unread,
        "retrained, price error of its answers": generated,
        "retrained, its one answer": said,
        "retrained, validation loss it reports": loss,
        "retrained, loss of the answers' tokens": loss_of_answer,
    }


def greedy(model: Phi3VForCausalLM, tokenizer: Any) -> str:
    """What it says after the original's prompt, which is the same for every picture."""
    begun = tokenizer(ASKED).input_ids
    ids = list(begun)
    while len(ids) < len(begun) + MAX_NEW_TOKENS:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>"):
            break
    return str(tokenizer.decode(ids[len(begun) :], skip_special_tokens=True)).strip()


def precision_points() -> Figures:
    """AdamW on bf16 weights without an fp32 copy, and with one: which are what they were, after the epoch's steps."""
    figures: Figures = {}
    torch.manual_seed(0)
    for name, start in {"matrices": torch.randn(100_000) * 0.02, "norms": torch.ones(100_000)}.items():
        for where, dtype in {"original": torch.bfloat16, "here": torch.float32}.items():
            before = start.to(dtype)
            weight = torch.nn.Parameter(before.clone())
            optimizer = torch.optim.AdamW([weight], lr=LEARNING_RATE)
            for _ in range(NUM_STEPS):
                weight.grad = torch.randn_like(weight)
                optimizer.step()
            stayed = (weight.detach() == before).float().mean().item()
            figures[f"weights that {NUM_STEPS} steps never moved, {name}: {where}"] = stayed
    return figures


def download_points(photos: Sequence[np.ndarray]) -> Figures:
    """Pictures of the usual kinds, saved as .jpg; and what that does to those it can save."""
    kinds = ("RGB", "L", "RGBA", "LA", "P", "CMYK")
    lost = [kind for kind in kinds if not _saves_as_jpeg(Image.fromarray(photos[0]).convert(kind))]
    changed = [np.abs(photo.astype(int) - _resaved(photo)).mean() for photo in photos]
    try:
        default_collate([None])
        missing = "goes on"
    except TypeError as error:
        missing = str(error).split(";")[-1].strip()
    return {
        "download, kinds of pictures lost": f"{len(lost)} of {len(kinds)}: {', '.join(lost)}",
        "download, grey steps changed on average": fmean(changed),
        "download, a missing file": missing,
    }


def _saves_as_jpeg(picture: Image.Image) -> bool:
    try:
        picture.save(io.BytesIO(), "JPEG")
    except OSError:
        return False
    return True


def _resaved(photo: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG")
    return np.asarray(Image.open(buffer), int)


def count_points() -> Figures:
    """What one epoch of it comes to on the 3,040 products, and what a split by row leaks when each has a twin."""
    num_train = int(TRAIN_FRAC * PRODUCTS)
    torch.manual_seed(3)
    train, validation = random_split(range(PRODUCTS), [num_train, PRODUCTS - num_train])
    seen = {i // 2 for i in train}
    return {
        "epoch, optimizer steps": NUM_STEPS,
        "epoch, products whose gradient is dropped": num_train % ACCUMULATION,
        "split by row, share of twins seen in training": fmean(i // 2 in seen for i in validation),
    }


def run_points(folder: Path) -> Figures:
    """From the run's own records."""
    scores = json.loads(max((folder / "eval").glob("step-*/scores.json")).read_text())
    packed = [row["data/pack_efficiency"] for row in read_metrics(folder) if "data/pack_efficiency" in row]
    return {
        "price error of generated answers: seeing": scores["eval/price_mae"],
        "price error of generated answers: blind": scores["eval/blind/price_mae"],
        "row, share filled": fmean(packed),
    }


def constant_points(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> Figures:
    """The least that not looking can miss: always the median price."""
    usual = median(float(product["full_price"]) for product in train)
    return {"price error of one price for all": fmean(abs(float(one["full_price"]) - usual) for one in validation)}


def read(data: Data) -> Iterator[Sample]:
    return (data.decoder.sample(i) for i in range(len(data.table)))


def points(settings: config.Settings, tokenizer_folder: Path, steps: int) -> Iterator[Figures]:
    """All figures, a few at a time."""
    official = Phi3VProcessor.from_pretrained(tokenizer_folder)
    folder = settings.run.folder
    train = [sample.fields for sample in read(Data.open(settings.data.train, settings))]
    validation = list(read(Data.open(settings.data.validation, settings)))
    asked, first = [sample.fields for sample in validation], validation[0]
    own = Phi3VProcessor.from_pretrained(folder / "export", settings.data.num_crops)
    model = Phi3VForCausalLM.from_pretrained(folder / "export")
    yield tag_points(official, first)
    yield loss_points(official, train)
    yield gradient_points(model, own, own.encode(first), text_of(own.tokenizer, first.fields))
    yield run_points(folder)
    yield constant_points(train, asked)
    yield forced_points(model, own, validation)
    yield precision_points()
    yield download_points([sample.images[0] for sample in validation[:20]])
    yield count_points()
    if steps:
        yield retrained_points(retrained(settings.model.path, train, steps, own.tokenizer), asked, own.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of a run that is finished and exported")
    parser.add_argument("tokenizer", type=Path, help="folder with Phi-3-vision's tokenizer and preprocessor files")
    parser.add_argument("--retrain", action="store_true", help="also train a model the original's way")
    arguments = parser.parse_args()
    settings = config.load(arguments.config)
    for figures in points(settings, arguments.tokenizer, (settings.train.steps or 0) * arguments.retrain):
        for name, value in figures.items():
            print(f"{name:48} {value if isinstance(value, str) else format(value, ',.4g')}", flush=True)


if __name__ == "__main__":
    main()
