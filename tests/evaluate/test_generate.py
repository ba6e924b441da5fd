"""Answers with a cache are those of running the whole text for every token, in whatever company."""

from dataclasses import replace

import pytest
import torch

from phi3v_dist.data.batch import Example
from phi3v_dist.evaluate import generate as module
from phi3v_dist.evaluate.generate import Answer, generate, local_copy, plain_linear, slices
from phi3v_dist.evaluate.sampling import GREEDY
from phi3v_dist.model import cache as cache_module
from phi3v_dist.model import vision as vision_module
from phi3v_dist.model.cache import Piece
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import num_image_tokens

ORIGINAL_LENGTH = 24  # LongRoPE's, made small so that short texts cross it
NEW_TOKENS = 14


@pytest.fixture(scope="module", params=[2, 1], ids=["mha", "gqa"])
def model(request, tiny_model):
    return talkative(read_config(tiny_model) | {"num_key_value_heads": request.param, "vocab_size": 1024})


def talkative(config: dict) -> Phi3VForCausalLM:
    """Large random weights: every token matters for the next one, and answers do not settle on one word."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Phi3VForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    model.rope.original_length = ORIGINAL_LENGTH
    return model


def text_prompt(length: int) -> Example:
    ids = torch.randint(300, 1000, (length,), generator=torch.Generator().manual_seed(length))
    none = torch.zeros(0, 2, dtype=torch.int64)
    return Example(length, ids, torch.full_like(ids, -100), torch.zeros(0, 3, 336, 336), none)


def picture_prompt(sizes: list[tuple[int, int]], length: int) -> Example:
    """Pictures of these (height, width), then `length` words."""
    generator = torch.Generator().manual_seed(length)
    places = [torch.full((num_image_tokens(*size),), -k) for k, size in enumerate(sizes, start=1)]
    ids = torch.cat([torch.tensor([1]), *places, torch.randint(300, 1000, (length,), generator=generator)])
    crops = sum(h * w // 336**2 + 1 for h, w in sizes)
    pixels = torch.randn(crops, 3, 336, 336, generator=generator)
    return Example(length, ids, torch.full_like(ids, -100), pixels, torch.tensor(sizes))


@torch.inference_mode()
def reference(model, prompt: Example, max_new_tokens: int, stop_ids=(), sampling=GREEDY) -> Answer:
    """The whole text anew for every token: no cache, nothing beside it."""
    ids, answer = prompt.input_ids, []
    while len(answer) < max_new_tokens:
        pictures = (prompt.pixel_values, prompt.image_sizes) if len(prompt.pixel_values) else ()
        (token,) = sampling.choose(model(ids[None], *pictures).logits[:, -1], [prompt.sample_id], len(answer))
        if token in stop_ids:
            return Answer(tuple(answer), True)
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
    return Answer(tuple(answer), False)


# From the first new token on: never, at the 13th, at the 2nd, at the 1st (the prompt is exactly at the limit), long.
TEXT_LENGTHS = (5, 12, 23, 24, 25, 40)


@pytest.fixture(scope="module")
def text(model):
    """Prompts on every side of the original length, and what the reference answers."""
    prompts = [text_prompt(length) for length in TEXT_LENGTHS]
    return prompts, [reference(model, prompt, NEW_TOKENS) for prompt in prompts]


def test_rows_that_cross_the_original_length_at_different_steps_answer_as_without_a_cache(model, text):
    prompts, expected = text
    assert generate(model, prompts, NEW_TOKENS, ()) == expected
    assert all(len(set(answer.ids)) > 4 for answer in expected), "answers that repeat one word would prove little"


def test_the_crossing_matters_to_these_answers(model, text):
    """Else the test above could not tell a cache that is made anew from one that is kept."""
    prompts, expected = text
    model.rope.original_length = 1000
    try:
        uncrossed = generate(model, prompts, NEW_TOKENS, ())
    finally:
        model.rope.original_length = ORIGINAL_LENGTH
    assert [a == b for a, b in zip(uncrossed, expected, strict=True)] == [True] + [False] * 5


def test_an_answer_does_not_depend_on_its_company(model, text):
    prompts, expected = text
    assert [generate(model, [prompt], NEW_TOKENS, ())[0] for prompt in prompts] == expected
    order = [4, 0, 5, 3, 1, 2]
    assert generate(model, [prompts[i] for i in order], NEW_TOKENS, ()) == [expected[i] for i in order]


def test_rows_stop_at_different_times_and_the_others_go_on(model, text):
    prompts, full = text
    stop_ids = (full[0].ids[3], full[3].ids[6], full[5].ids[0])  # ids that some rows say, at different steps
    expected = [reference(model, prompt, NEW_TOKENS, stop_ids) for prompt in prompts]
    assert generate(model, prompts, NEW_TOKENS, stop_ids) == expected
    assert len({len(answer.ids) for answer in expected}) >= 3
    assert Answer((), True) in expected, "a stop id at once leaves nothing"
    assert any(not answer.stopped and len(answer.ids) == NEW_TOKENS for answer in expected)


def test_a_stop_id_in_the_last_place_counts_and_one_after_it_does_not(model, text):
    prompts, full = text
    ids = full[1].ids
    last = next(i for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    assert generate(model, prompts[1:2], last + 1, [ids[last]]) == [Answer(ids[:last], True)]
    assert generate(model, prompts[1:2], last, [ids[last]]) == [Answer(ids[:last], False)]


@torch.inference_mode()
def batch_reference(model, prompts: list[Example], max_new_tokens: int) -> list[Answer]:
    """Greedy, one padded batch anew for every token: what the batch decides together, as in the published code."""
    rows = [prompt.input_ids for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            answers[i].append(int(logits[i, len(row) - 1].argmax()))
            rows[i] = torch.cat([row, torch.tensor(answers[i][-1:])])
    return [Answer(tuple(ids), False) for ids in answers]


@pytest.fixture
def ruled(model):
    """The same weights under another LongRoPE rule."""

    def ruled(rule: str) -> Phi3VForCausalLM:
        other = Phi3VForCausalLM(model.config, rule).eval()
        other.load_state_dict(model.state_dict())
        other.rope.original_length = ORIGINAL_LENGTH
        return other

    return ruled


@pytest.mark.parametrize("rule", ["max_position", "key_length"])
def test_under_a_batch_rule_the_longest_row_turns_all_of_them_long(ruled, text, rule):
    """Prompts of 5, 12 and 20: the third crosses at its 5th word, and the others' keys and values with it."""
    prompts, own = [*text[0][:2], text_prompt(20)], text[1]
    other = ruled(rule)
    answers = generate(other, prompts, NEW_TOKENS, ())
    assert answers == batch_reference(other, prompts, NEW_TOKENS)
    assert answers[0].ids[:4] == own[0].ids[:4] and answers[0] != own[0], "changed by its company, from the crossing on"
    assert [generate(other, [prompt], NEW_TOKENS, ())[0] for prompt in text[0]] == own, "alone, all rules agree"


def test_under_a_batch_rule_rows_that_have_ended_count_on(ruled, text):
    """As padding does in the published code: a row's factors do not fall back to short when the longest one stops."""
    other, prompts = ruled("key_length"), [text[0][1], text_prompt(20)]
    full = batch_reference(other, prompts, NEW_TOKENS)
    stop = next(token for i, token in enumerate(full[1].ids) if i < 7 and token not in full[0].ids + full[1].ids[:i])
    stopped = generate(other, prompts, NEW_TOKENS, [stop])
    assert stopped[0] == full[0] and stopped[1].stopped and len(stopped[1].ids) < 7


@pytest.mark.parametrize("rule", ["short", "long"])
def test_under_a_fixed_rule_nothing_is_made_anew_and_company_does_not_matter(ruled, text, rule, monkeypatch):
    other, prompts = ruled(rule), text[0]
    expected = [reference(other, prompt, NEW_TOKENS) for prompt in prompts]
    prefills = []
    prefill = module._Rows.prefill
    monkeypatch.setattr(module._Rows, "prefill", lambda rows, which: prefills.append(which) or prefill(rows, which))
    assert generate(other, prompts, NEW_TOKENS, ()) == expected
    assert len(prefills) == 1
    assert expected != text[1]


@pytest.mark.parametrize("attention", ["eager", "auto"])
def test_the_cache_attends_by_itself_whatever_the_backend(model, text, attention):
    other = Phi3VForCausalLM(model.config, attention=attention).eval()
    other.load_state_dict(model.state_dict())
    other.rope.original_length = ORIGINAL_LENGTH
    assert generate(other, text[0], NEW_TOKENS, ()) == text[1]


@pytest.mark.parametrize("original_length", [318, 500], ids=["crossing", "short"])
def test_prompts_with_pictures_answer_as_without_a_cache(model, original_length):
    prompts = [
        picture_prompt([(336, 336)], 4),  # 318 tokens: exactly at the limit when it is crossed
        text_prompt(9),
        picture_prompt([(336, 336)], 1),
        picture_prompt([(336, 672), (336, 336)], 6),
    ]
    model.rope.original_length = original_length
    try:
        expected = [reference(model, prompt, 5) for prompt in prompts]
        assert generate(model, prompts, 5, ()) == expected
        assert generate(model, prompts[::-1], 5, ()) == expected[::-1]
    finally:
        model.rope.original_length = ORIGINAL_LENGTH


def test_another_picture_gives_another_answer(model):
    prompt, other = picture_prompt([(336, 336)], 4), picture_prompt([(336, 336)], 5)
    first, second = generate(model, [prompt, replace(prompt, pixel_values=other.pixel_values)], 5, ())
    assert first != second


def test_a_prompt_whose_pictures_are_missing_is_refused(model):
    prompt = picture_prompt([(336, 336)], 4)
    with pytest.raises(ValueError, match="places for pictures, but pixel_values or image_sizes is missing"):
        generate(model, [replace(prompt, pixel_values=torch.zeros(0, 3, 336, 336))], 5, ())
    with pytest.raises(ValueError, match="is missing"):
        model(prompt.input_ids[None])


def test_no_prompts_give_no_answers(model):
    assert generate(model, [], 5, ()) == []


def test_the_global_generator_is_left_alone_and_nothing_wants_a_gradient(model, text):
    before = torch.random.get_rng_state()
    generate(model, text[0][:2], 3, ())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bf16_weights_are_answered_in_bf16(model, text):
    answers = generate(local_copy(model).bfloat16(), text[0], 4, ())
    assert all(len(answer.ids) == 4 for answer in answers)


def test_a_copy_is_whole_and_its_own(model, text):
    model.train()
    copy = local_copy(model)
    model.eval()
    assert not copy.training
    assert copy.state_dict().keys() == model.state_dict().keys()
    for (name, ours), (_, theirs) in zip(copy.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr(), name
    copy.rope.original_length = ORIGINAL_LENGTH
    prompt = picture_prompt([(336, 336)], 4)
    assert generate(copy, [prompt], 3, ()) == generate(model, [prompt], 3, ())


def replacement(*arguments):
    raise AssertionError("DeepSpeed's linear was called")


def test_generation_uses_torchs_own_linear_and_puts_the_replaced_one_back(model, text, monkeypatch):
    expected = generate(model, text[0][:1], 3, ())
    monkeypatch.setattr(torch.nn.functional, "linear", replacement)
    assert generate(model, text[0][:1], 3, ()) == expected
    assert torch.nn.functional.linear is replacement


def test_the_replaced_linear_is_put_back_after_an_exception_too(model, text, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", replacement)
    with pytest.raises(KeyError), plain_linear():
        assert torch.nn.functional.linear is torch._C._nn.linear
        raise KeyError
    monkeypatch.setattr(module._Rows, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, text[0][:1], 3, ())
    assert torch.nn.functional.linear is replacement


# -- prompts longer than a slice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_tokens", [7, 12, 24, 40])
def test_prompts_that_are_prefilled_in_slices_answer_as_in_one(model, text, slice_tokens, monkeypatch):
    """Also where a row crosses and is prefilled again, and where a slice shares its mask among few queries."""
    prompts, expected = text
    monkeypatch.setattr(module, "PREFILL_TOKENS", slice_tokens)
    monkeypatch.setattr(cache_module, "MASKED_QUERIES", 5)
    assert generate(model, prompts, NEW_TOKENS, ()) == expected


def test_pictures_may_be_cut_by_a_slice_and_seen_in_chunks(model, monkeypatch):
    prompts = [picture_prompt([(336, 672), (336, 336)], 6), text_prompt(9), picture_prompt([(336, 336)], 4)]
    expected = generate(model, prompts, 5, ())
    monkeypatch.setattr(module, "PREFILL_TOKENS", 100)
    monkeypatch.setattr(vision_module, "CROPS_WITHOUT_GRADIENTS", 2)
    assert generate(model, prompts, 5, ()) == expected


def test_no_forward_call_of_a_prefill_is_longer_than_a_slice(model, text, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    seen = []
    run = module._Rows._run
    monkeypatch.setattr(
        module._Rows, "_run", lambda rows, embeds, *a: seen.append(embeds.shape[1]) or run(rows, embeds, *a)
    )
    generate(model, text[0], 1, ())
    assert sum(seen) == sum(TEXT_LENGTHS) and max(seen) == 16


def test_only_what_is_longer_than_a_slice_is_cut(monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 10)
    assert slices([0, 1, 2, 3], [4, 6, 23, 5]) == [
        [Piece(0, 0, 4), Piece(1, 0, 6)], [Piece(2, 0, 10)], [Piece(2, 10, 20)], [Piece(2, 20, 23), Piece(3, 0, 5)],
    ]  # fmt: skip
