"""Drawn tokens: the distribution they follow, and all that they do not depend on."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_generate import NEW_TOKENS, TEXT_LENGTHS, reference, talkative, text_prompt

from phi3v_dist.errors import ConfigError
from phi3v_dist.evaluate.generate import generate
from phi3v_dist.evaluate.sampling import Sampling
from phi3v_dist.model.official_config import read_config

LOGITS = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
HOT = Sampling(temperature=1.3, top_p=0.9, seed=7)


def frequencies(sampling: Sampling, logits=LOGITS, draws=4000) -> dict[int, float]:
    found = sampling.choose(logits.expand(draws, -1), range(draws), step=3)
    return {token: count / draws for token, count in Counter(found).items()}


def test_tokens_are_drawn_by_their_probability():
    assert frequencies(Sampling(1.0)) == pytest.approx({0: 0.2, 1: 0.5, 2: 0.05, 3: 0.25}, abs=0.03)


def test_temperature_flattens_and_sharpens():
    weights = torch.tensor([0.2, 0.5, 0.05, 0.25]) ** 2
    expected = dict(enumerate((weights / weights.sum()).tolist()))
    assert frequencies(Sampling(0.5)) == pytest.approx(expected, abs=0.03)
    assert frequencies(Sampling(100.0)) == pytest.approx(dict.fromkeys(range(4), 0.25), abs=0.03)


def test_top_p_keeps_the_likeliest_tokens_that_reach_it():
    assert frequencies(Sampling(1.0, top_p=0.75)) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=0.03)
    assert frequencies(Sampling(1.0, top_p=0.76)).keys() == {0, 1, 3}, "the one that reaches it is among them"
    assert frequencies(Sampling(1.0, top_p=1e-9)).keys() == {1}, "there is always one"


def test_of_equally_likely_tokens_the_first_come_first():
    assert frequencies(Sampling(1.0, top_p=0.5), torch.zeros(4)).keys() == {0, 1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6])
def test_extreme_temperatures_are_numbers_still(temperature):
    found = frequencies(Sampling(temperature), LOGITS.float() * 50)
    assert found.keys() == {1} if temperature < 1 else len(found) == 4


def test_a_token_that_cannot_be_is_never_drawn():
    assert frequencies(Sampling(1.0), torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf])).keys() == {1}


def test_at_temperature_0_the_best_token_is_taken():
    assert frequencies(Sampling()).keys() == {1}


def test_a_draw_depends_on_seed_sample_and_step_alone():
    many = LOGITS.expand(200, -1)
    first = HOT.choose(many, range(200), step=0)
    assert HOT.choose(many, range(200), step=0) == first
    assert [HOT.choose(LOGITS[None], [i], step=0)[0] for i in range(200)] == first
    for other in (
        HOT.choose(many, range(200), step=1), HOT.choose(many, range(1, 201), step=0),
        replace(HOT, seed=8).choose(many, range(200), step=0),
    ):  # fmt: skip
        assert other != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0: it is a probability, above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.fixture(scope="module")
def model(tiny_model):
    return talkative(read_config(tiny_model) | {"vocab_size": 1024})


def test_drawn_answers_do_not_depend_on_batch_order_or_cache_and_touch_no_generator(model):
    prompts = [text_prompt(length) for length in TEXT_LENGTHS]
    before = torch.random.get_rng_state()
    answers = generate(model, prompts, NEW_TOKENS, (), HOT)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert answers == [reference(model, prompt, NEW_TOKENS, sampling=HOT) for prompt in prompts]
    assert answers == [generate(model, [prompt], NEW_TOKENS, (), HOT)[0] for prompt in prompts]
    assert answers[::-1] == generate(model, prompts[::-1], NEW_TOKENS, (), HOT)
    others = generate(model, prompts, NEW_TOKENS, (), replace(HOT, seed=8))
    assert all(one != other for one, other in zip(answers, others, strict=True))
    assert all(one != best for one, best in zip(answers, generate(model, prompts, NEW_TOKENS, ()), strict=True))


def test_rows_that_stop_leave_the_draws_of_the_others_alone(model):
    prompts = [text_prompt(length) for length in TEXT_LENGTHS]
    stop_ids = [answer.ids[i] for i, answer in enumerate(generate(model, prompts, NEW_TOKENS, (), HOT)) if i % 2]
    expected = [reference(model, prompt, NEW_TOKENS, stop_ids, HOT) for prompt in prompts]
    assert generate(model, prompts, NEW_TOKENS, stop_ids, HOT) == expected
    assert {answer.stopped for answer in expected} == {True, False}
