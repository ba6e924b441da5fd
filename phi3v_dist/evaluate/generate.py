"""Prompts → answers, on a copy of the weights that no ZeRO-3 hook watches.

What comes in: encoded prompts. What goes out: the ids each prompt was answered with. Surprise: while training goes on
under ZeRO-3, every rank fills a plain model from the partitions once and then generates at its own pace; through the
hooked model each token would gather all weights again, and a rank with a shorter answer would have to keep step. The
copy is the same class as an exported folder's model, so scores do not depend on where they are taken.

LongRoPE: a row whose factors change, because the length that decides them passes the original context, is prefilled
again from its kept embeddings: its keys and values were made with the short factors (both are stale: deeper layers saw
short-factor attention). Under the official batch rules the longest row decides for all, so all change together; under
`short` and `long` none ever does. Whatever `model.attention` says, the cache attends by itself, with sdpa per document
while prefilling. Long prompts are prefilled in slices, every token's factors chosen by its row's full length all the
same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from phi3v_dist.data.batch import Example
from phi3v_dist.evaluate.sampling import GREEDY, Sampling
from phi3v_dist.model.adapters import merged_parameters
from phi3v_dist.model.cache import KeyValueCache, Piece
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import Placement
from phi3v_dist.parallel.zero import TORCH_LINEAR
from phi3v_dist.watch import heartbeat

# Tokens in one forward call of a prefill. What one layer computes for them is then all there is beside the weights, the
# cache and the prompts' embeddings: in the real model's feed-forward part 0.4 GB, where 131,072 tokens at once take 6
# (16,384 + 8,192 numbers a token, bf16).
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Answer:
    """What one prompt was answered with. stopped: a stop id came before the limit; it is not among the ids."""

    ids: tuple[int, ...]
    stopped: bool


def local_copy(model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    """A plain model with the weights of one that may be partitioned; then all ranks must call this together."""
    tensors = dict(merged_parameters(model))
    heartbeat.beat("the copy", kind="build")
    return Phi3VForCausalLM.without_weights(model.config, model.longrope, model.attention).take(tensors)


@contextmanager
def plain_linear() -> Iterator[None]:
    """torch's own `linear` for the length of a `with`.

    DeepSpeed replaces it for the whole process (`memory_efficient_linear`); in bf16 the answers then differ from those
    of an exported folder.
    """
    replaced = torch.nn.functional.linear
    torch.nn.functional.linear = TORCH_LINEAR
    try:
        yield
    finally:
        torch.nn.functional.linear = replaced


def _next(kind: str, work: int, device: torch.device) -> None:
    """Say which kind of work comes next. What an accelerator still has in its queue belongs to the kind before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    heartbeat.beat(kind=kind, work=work)


class _Rows:
    """Rows under generation: their cache, which prompts they answer, and, of those whose factors may still change,
    the embeddings so far."""

    def __init__(self, model: Phi3VForCausalLM, prompts: Sequence[Example], max_new_tokens: int):
        self.model, self.device = model, model.lm_head.weight.device
        self.lengths = [len(prompt.input_ids) for prompt in prompts]
        # In pieces, since to join them at every token is costly.
        self.embeds = [[piece] for piece in self._embed(prompts).split(self.lengths)]
        self.longest = max(self.lengths)  # of the batch, rows that have ended counted on: as the published code pads
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.cache = KeyValueCache(len(prompts), max(self.lengths) + max_new_tokens)
        self.active = list(range(len(prompts)))  # prompt number of each row of the cache

    def _embed(self, prompts: Sequence[Example]) -> Tensor:
        """Words and pictures of all prompts, one after the other: [tokens, hidden]."""
        ids = torch.cat([prompt.input_ids for prompt in prompts])[None]
        shown = [prompt for prompt in prompts if len(prompt.pixel_values)]
        if not shown:
            return self.model.model.embed(ids.to(self.device), None, None)[0]
        _next("vision", sum(len(prompt.pixel_values) for prompt in shown), self.device)
        placement = Placement.in_row(ids, torch.cat([prompt.image_sizes for prompt in shown])).to(self.device)
        pixels = torch.cat([prompt.pixel_values for prompt in shown]).to(self.device)
        return self.model.model.embed(ids.to(self.device), pixels, placement)[0]

    def prefill(self, rows: Sequence[int]) -> Tensor:
        """Run these rows' whole texts, as documents of flat rows; the hidden state at each one's end."""
        numbers = [self.active[row] for row in rows]
        for number in numbers:
            if len(self.embeds[number]) > 1:
                self.embeds[number] = [torch.cat(self.embeds[number])]
        embeds = {row: self.embeds[number][0] for row, number in zip(rows, numbers, strict=True)}
        own = torch.tensor([self.lengths[number] for number in numbers])
        deciding = dict(zip(rows, self.model.rope.deciding(own, self.longest, self.longest), strict=True))
        ends: dict[int, Tensor] = {}
        for pieces in slices(rows, own.tolist()):
            _next("prefill", sum(piece.end - piece.start for piece in pieces), self.device)
            self.cache.begin_prefill(pieces)
            hidden = self._run(
                torch.cat([embeds[row][start:end] for row, start, end in pieces])[None],
                torch.cat([torch.arange(start, end) for _, start, end in pieces])[None],
                torch.cat([deciding[row].expand(end - start) for row, start, end in pieces])[None],
            )[0]
            at = 0
            for row, start, end in pieces:
                at += end - start
                ends[row] = hidden[at - 1]  # at last that of the row's last piece
        return torch.stack([ends[row] for row in rows])

    def forget(self, max_new_tokens: int) -> None:
        """After the prefill: drop the embeddings of rows whose factors no answer of that length can change."""
        own, longest = torch.tensor(self.lengths), self.longest
        now = self.model.rope.deciding(own, longest, longest)
        then = self.model.rope.deciding(own + max_new_tokens, longest + max_new_tokens, longest + max_new_tokens)
        for number in (self.model.rope.is_long(now) == self.model.rope.is_long(then)).nonzero().flatten().tolist():
            self.embeds[number] = []

    def decode(self, ids: Tensor) -> Tensor:
        """One more token for every active row; the hidden state at it."""
        embeds = self.model.model.embed_tokens(ids.to(self.device))  # [rows, hidden]
        was_long = self.model.rope.is_long(self._deciding())
        self.longest += 1
        for row, number in enumerate(self.active):
            if self.embeds[number]:
                self.embeds[number].append(embeds[row : row + 1])
            self.lengths[number] += 1
        self.cache.begin_decode(self.device)
        deciding = self._deciding()
        hidden = self._run(embeds[:, None], self.cache.lengths[:, None] - 1, deciding[:, None])[:, 0]
        crossing = (self.model.rope.is_long(deciding) != was_long).nonzero().flatten().tolist()
        if crossing:
            hidden[crossing] = self.prefill(crossing)
        return hidden

    def _deciding(self) -> Tensor:
        """For every active row the length that chooses its factors now."""
        own = torch.tensor([self.lengths[number] for number in self.active])
        return self.model.rope.deciding(own, self.longest, self.longest)

    def _run(self, embeds: Tensor, positions: Tensor, rope_lengths: Tensor) -> Tensor:
        rotation = self.model.rope(positions.to(self.device), rope_lengths.to(self.device), embeds.dtype)
        return self.model.model(embeds, rotation, cache=self.cache)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) < len(self.active):
            self.cache.keep(torch.tensor(rows, dtype=torch.int64))
            self.active = [self.active[row] for row in rows]


def slices(rows: Sequence[int], lengths: Sequence[int]) -> list[list[Piece]]:
    """Rows of these lengths in forward calls of at most `PREFILL_TOKENS`; only what is longer than that is cut."""
    found: list[list[Piece]] = [[]]
    room = PREFILL_TOKENS
    for row, length in zip(rows, lengths, strict=True):
        for start in range(0, length, PREFILL_TOKENS):
            end = min(start + PREFILL_TOKENS, length)
            if end - start > room:
                found.append([])
                room = PREFILL_TOKENS
            found[-1].append(Piece(row, start, end))
            room -= end - start
    return found


@torch.inference_mode()
def generate(
    model: Phi3VForCausalLM, prompts: Sequence[Example], max_new_tokens: int, stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
) -> list[Answer]:  # fmt: skip
    """Answers to all prompts, as one batch.

    The same prompt gets the same answer in any batch (fp32; in bf16 rounding may differ with the batch), drawn or not,
    except under LongRoPE's official batch rules, which are made of depending on it.
    """
    stopped = [False] * len(prompts)
    if not prompts:
        return []
    with plain_linear():
        rows = _Rows(model, prompts, max_new_tokens)
        hidden = rows.prefill(range(len(prompts)))
        rows.forget(max_new_tokens)
        for step in range(max_new_tokens):
            sample_ids = [prompts[number].sample_id for number in rows.active]
            chosen = sampling.choose(model.lm_head(hidden), sample_ids, step)
            going = []
            for row, (number, token) in enumerate(zip(rows.active, chosen, strict=True)):
                if token in stop_ids:
                    stopped[number] = True
                    continue
                rows.answers[number].append(token)
                if len(rows.answers[number]) < max_new_tokens:
                    going.append(row)
            if not going:
                break
            rows.keep(going)
            _next("decode", len(going), rows.device)
            hidden = rows.decode(torch.tensor([chosen[row] for row in going]))
    return [Answer(tuple(ids), stop) for ids, stop in zip(rows.answers, stopped, strict=True)]
