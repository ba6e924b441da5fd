"""Validation samples → answers → scores, with a blind control beside every figure.

What comes in: a model and validation data. What goes out: metrics, and records for people. Surprise: the blind
control is not a text-only run; it asks every question with another sample's pictures of the same crop grid, so that
token counts and everything else stay, and only what is seen is wrong.

Batches, not samples, are the unit of work: they are cut in sample order before they are dealt to the ranks, so that
each answer is made in the same company whatever the number of ranks. A sample that cannot be read is left out, named in
the log and counted in `eval/skipped`. Pictures are cut exactly (`processor.encode`), whatever `data.crops` says for
training: scores are those that a user of the published processor gets.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.config import EvalSettings
from phi3v_dist.data.batch import Example, Row, collate
from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.plan import Lengths
from phi3v_dist.data.samples import BadSample, Message, Sample
from phi3v_dist.evaluate.breakdown import (
    POSITION,
    Judged,
    LearnedTokens,
    Value,
    complaints,
    of_documents,
    split_metrics,
)
from phi3v_dist.evaluate.controls import read_judged, with_controls
from phi3v_dist.evaluate.generate import generate, local_copy, plain_linear
from phi3v_dist.evaluate.highest_loss import HighestLoss
from phi3v_dist.evaluate.records import thumbnail, write_records
from phi3v_dist.evaluate.sampling import Sampling
from phi3v_dist.evaluate.score import AnswerScore, score_answer
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.progress import track
from phi3v_dist.watch import heartbeat

MIN_PARTNERS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Asks a model the validation questions.

    lengths: of the samples, by which batches are cut.
    sample_ids: usable validation samples, in the fixed order in which they are asked.
    seed: of draws, where `eval.temperature` asks for them.
    """

    decoder: Decoder
    lengths: Lengths
    sample_ids: tuple[int, ...]
    settings: EvalSettings
    topology: Topology
    seed: int = 0

    def run(
        self,
        model: Phi3VForCausalLM,
        folder: Path | None,
        num_samples: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        base: Path | None = None,
        blind: bool = True,
    ) -> dict[str, float] | None:
        """Ask the first `num_samples` questions (None: all) and score the answers; all ranks call this together.

        Args:
            model: may be partitioned by ZeRO-3.
            folder: where rank 0 writes records; None: nowhere.
            stop: asked before each batch, on this rank alone; once it says yes, nothing is written and None comes back
                on every rank.
            base: records of the untuned model, with which the answers are compared; rank 0 reads them.
            blind: whether to ask blind, too, where the settings say so.
        """
        heartbeat.enter("evaluate", what="a copy of the model")  # every rank, also one that gets no batch
        copy = local_copy(model)
        sample_ids = self.sample_ids[:num_samples]
        place = {sample_id: i for i, sample_id in enumerate(sample_ids)}
        partners = self._partners(sample_ids) if self.settings.blind and blind else {}
        batches = self._batches(sample_ids)
        rows, highest = [], HighestLoss(self.decoder.processor, place)
        own_batches = batches[self.topology.rank :: self.topology.world_size]
        for number, batch in enumerate(track(own_batches, "evaluating", "batches")):
            if stop():
                break
            heartbeat.enter("evaluate", number, self.decoder.table.sample_name(batch[0]))
            rows += self._ask(copy, batch, partners, highest)
        del copy
        tokens = highest.tokens()
        rows = [row | {"tokens": tokens.get(row["sample_id"])} for row in rows]
        heartbeat.enter("score")  # untimed: ranks with few batches wait here for those with many
        (given_up,) = self.topology.sum([float(stop())])
        if given_up:
            return None
        everyone = (row for part in self.topology.gather_on_main(rows) for row in part)
        rows = sorted(everyone, key=lambda row: place[row["sample_id"]])
        metrics = self._conclude(rows, len(sample_ids), folder, base) if self.topology.is_main else {}
        return self.topology.broadcast(metrics)

    def _conclude(
        self, rows: list[dict[str, Any]], num_asked: int, folder: Path | None, base: Path | None
    ) -> dict[str, float]:
        """Metrics of all ranks' rows, and the records."""
        judged: list[Judged] = [row.pop("judged") for row in rows]
        known = read_judged(base, self.settings.fields) if base else {}
        untuned = [known.get((row["shard"], row["key"], row["target"])) for row in rows]
        if base and rows and not any(untuned):
            log.warning("%s: none of these samples was asked there, so nothing is compared with it", base)
        for complaint in complaints(judged, self.settings.by):
            log.warning("%s", complaint)
        metrics = {"eval/skipped": float(num_asked - len(rows))} | with_controls(judged, untuned)
        metrics |= split_metrics(judged, self.settings.by)
        if folder is not None:
            write_records(folder, rows, metrics)
        return metrics

    def _batches(self, sample_ids: Sequence[int]) -> list[list[int]]:
        """Samples that are answered together: as many as `eval` allows, and as take so many places for tokens."""
        batches: list[list[int]] = []
        longest = 0
        for sample_id in sample_ids:
            num_tokens = int(self.lengths.tokens[sample_id])
            longest = max(longest, num_tokens)
            full = not batches or len(batches[-1]) == self.settings.batch_samples
            if full or (len(batches[-1]) + 1) * longest > self.settings.batch_tokens:
                batches.append([])
                longest = num_tokens
            batches[-1].append(sample_id)
        return batches

    @torch.inference_mode()
    def _ask(
        self, model: Phi3VForCausalLM, sample_ids: Sequence[int], partners: dict[int, int], highest: HighestLoss
    ) -> list[dict[str, Any]]:
        """Answers of one batch as rows; `judged` of each is what the metrics are made of, and `highest` hears of all
        losses."""
        processor = self.decoder.processor
        read = [pair for sample_id in sample_ids if (pair := self._read(sample_id))]
        if not read:
            return []
        samples = [sample for sample, _ in read]
        values = [self._values(sample, example) for sample, example in read]
        learned = self._losses(model, [example for _, example in read])
        heartbeat.beat(kind="read")
        prompts = [processor.encode_prompt(_asked(s.messages), s.images, s.sample_id) for s in samples]
        scores, texts = self._answers(model, samples, prompts)
        exchanged = {
            i: other
            for i, prompt in enumerate(prompts)
            if prompt.sample_id in partners and (other := self._exchange(prompt, partners[prompt.sample_id]))
        }
        answers = self._answers(model, [samples[i] for i in exchanged], list(exchanged.values()))
        blind = dict(zip(exchanged, zip(*answers, strict=True), strict=True))
        rows = []
        for i, (sample, score, text, tokens) in enumerate(zip(samples, scores, texts, learned, strict=True)):
            blind_score, blind_text = blind.get(i, (None, None))
            control = {"prediction": blind_text} | asdict(blind_score) if blind_score else None
            by_position = tokens.sums(self.settings.by.get(POSITION))
            loss_sum, num_labels = tokens.losses.double().sum().item(), len(tokens.losses)
            highest.add(sample.sample_id, sample.messages, tokens.losses)
            rows.append(
                {
                    "sample_id": sample.sample_id, "shard": sample.shard, "key": sample.key, "source": sample.source,
                    "by": values[i], "loss": loss_sum / num_labels if num_labels else None, "label_tokens": num_labels,
                    "prompt": _question(_asked(sample.messages)), "target": _truth(sample.messages), "prediction": text,
                    **asdict(score), "thumbnail": thumbnail(sample.images[0]) if sample.images else None,
                    "blind": control,
                    "judged": Judged(score, blind_score, values[i], loss_sum, num_labels, by_position),
                }
            )  # fmt: skip
        return rows

    def _losses(self, model: Phi3VForCausalLM, examples: Sequence[Example]) -> list[LearnedTokens]:
        """Losses of each example's learned tokens: no logits are made of the others, however long it is."""
        batch = collate(Row(tuple(examples)), self.decoder.processor.tokenizer.pad_token_id)
        if not batch.label_tokens:  # a model asked for neither losses nor logits would give logits
            return of_documents(batch.layout, torch.zeros(0))
        heartbeat.beat(kind="losses", work=batch.input_ids.numel())
        with plain_linear():
            losses = model(**batch.inputs(model.lm_head.weight.device)).token_losses
        return of_documents(batch.layout, losses)

    def _values(self, sample: Sample, example: Example) -> dict[str, Value]:
        """What the sample has in the fields of `eval.by`."""
        own: dict[str, Value] = {
            "source": sample.source, "num_tokens": len(example.input_ids), "num_images": len(example.image_sizes),
            "megapixels": max((image.shape[0] * image.shape[1] for image in sample.images), default=0) / 1e6,
        }  # fmt: skip
        fields = own | dict(sample.fields)
        return {name: fields[name] for name in self.settings.by if name in fields and name != POSITION}

    def _read(self, sample_id: int) -> tuple[Sample, Example] | None:
        heartbeat.beat(kind="read")
        try:
            sample = self.decoder.sample(sample_id)
            return sample, self.decoder.processor.encode(sample)
        except BadSample as error:
            log.warning("left out of the evaluation: %s", error)
            return None

    def _exchange(self, prompt: Example, partner: int) -> Example | None:
        """The prompt with its partner's pictures; None when those cannot be read or are shown in another order."""
        read = self._read(partner)
        if read is None or not torch.equal(read[1].image_sizes, prompt.image_sizes):
            return None
        return replace(prompt, pixel_values=read[1].pixel_values)

    def _answers(
        self, model: Phi3VForCausalLM, samples: Sequence[Sample], prompts: Sequence[Example]
    ) -> tuple[list[AnswerScore], list[str]]:
        processor = self.decoder.processor
        sampling = Sampling(self.settings.temperature, self.settings.top_p, self.seed)
        answers = generate(model, prompts, self.settings.max_new_tokens, processor.stop_ids, sampling)
        heartbeat.beat(kind="judge")
        texts = [str(processor.tokenizer.decode(list(answer.ids))).strip() for answer in answers]
        scores = [
            score_answer(text, _truth(sample.messages), self.settings.fields, answer.stopped, len(answer.ids))
            for sample, answer, text in zip(samples, answers, texts, strict=True)
        ]
        return scores, texts

    def _partners(self, sample_ids: Sequence[int]) -> dict[int, int]:
        """Sample → another one whose pictures have the same crop grids, half a turn away in its group."""
        table, num_crops = self.decoder.table, self.decoder.processor.num_crops
        groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for sample_id in sample_ids:
            shard, number = table.locate(sample_id)
            sizes = table.index(shard).image_sizes(number).values()
            groups[tuple(CropLayout.of(*size, num_crops).padded_hw for size in sizes)].append(sample_id)
        partners: dict[int, int] = {}
        for grids, group in groups.items():
            if grids and len(group) >= MIN_PARTNERS:
                half = len(group) // 2
                partners |= dict(zip(group, group[half:] + group[:half], strict=True))
        return partners


def _asked(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation through its last answer, which is the one asked for."""
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    return messages[: last + 1]


def _question(messages: Sequence[Message]) -> str:
    """The words of the last user turn."""
    turns = [message for message in messages if message.role == "user"]
    return " ".join(part for part in turns[-1].parts if isinstance(part, str)) if turns else ""


def _truth(messages: Sequence[Message]) -> str:
    """The words of the last assistant turn."""
    turns = [message for message in messages if message.role == "assistant"]
    return "".join(part for part in turns[-1].parts if isinstance(part, str)).strip() if turns else ""
