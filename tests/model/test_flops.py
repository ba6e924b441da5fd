"""FLOPs of a row: the published sizes give the design's figures, and what is not trained counts less."""

import pytest

from phi3v_dist.config import PartsSettings
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.model.flops import attention_pair, decoder_token, flops, projector_crop, tower_crop

OFFICIAL = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "img_processor": {},
}  # fmt: skip
ALL = PartsSettings()


def document(tokens: int, crops: int = 0) -> PlannedRow:
    return PlannedRow((0,), tokens, tokens**2, tokens, crops)


def test_the_terms_are_those_of_the_design() -> None:
    """MODEL.md §10, to the digits it gives."""
    work = flops(OFFICIAL, ALL)
    assert work.per_token + work.per_label_token == 6 * 3_722_379_264
    assert work.per_squared_token == 3 * attention_pair(OFFICIAL) == 6 * 32 * 3072
    assert tower_crop(OFFICIAL) == pytest.approx(366.0e9, rel=2e-4)
    assert projector_crop(OFFICIAL) / 144 == pytest.approx(44.0e6, rel=1e-3)


@pytest.mark.parametrize(("tokens", "petaflops"), [(4096, 0.1014), (32_768, 1.365), (131_072, 13.06)])
def test_a_sequence_of_text_has_the_flops_of_the_design(tokens: int, petaflops: float) -> None:
    assert flops(OFFICIAL, ALL).of_row(document(tokens)) == pytest.approx(petaflops * 1e15, rel=5e-4)


def test_a_picture_of_17_crops_is_a_quarter_vision() -> None:
    work = flops(OFFICIAL, ALL)
    assert work.per_crop * 17 == pytest.approx(18.7e12 + 17 * 3 * projector_crop(OFFICIAL), rel=2e-3)
    assert work.per_crop * 17 / work.of_row(document(2509, crops=17)) == pytest.approx(0.25, abs=0.01)


def test_what_is_not_trained_has_no_gradient_of_its_own_and_none_at_all_with_nothing_below() -> None:
    tower, projector, token = tower_crop(OFFICIAL), projector_crop(OFFICIAL), decoder_token(OFFICIAL)
    frozen_vision = flops(OFFICIAL, PartsSettings(vision="frozen"))
    assert frozen_vision.per_crop == tower + 3 * projector and frozen_vision.per_token == 3 * token
    only_projector = flops(OFFICIAL, PartsSettings(vision="frozen", text="frozen"))
    assert only_projector.per_token == 2 * token  # gradients pass through it
    only_text = flops(OFFICIAL, PartsSettings(vision="frozen", projector="frozen", text="lora"))
    assert only_text.per_crop == tower + projector and only_text.per_token == 2 * token
    for parts in (frozen_vision, only_projector, only_text):
        assert parts.per_squared_token == flops(OFFICIAL, ALL).per_squared_token


def test_recomputing_repeats_the_forward_pass_where_there_is_a_backward_pass() -> None:
    plain, again = (flops(OFFICIAL, ALL, recompute=on) for on in (False, True))
    assert again.per_token == pytest.approx(4 / 3 * plain.per_token)
    assert again.per_squared_token == pytest.approx(4 / 3 * plain.per_squared_token)
    assert again.per_crop - plain.per_crop == tower_crop(OFFICIAL)
    frozen = PartsSettings(vision="frozen")
    assert flops(OFFICIAL, frozen, recompute=True).per_crop == flops(OFFICIAL, frozen).per_crop


def test_grouped_query_attention_has_fewer_weights() -> None:
    grouped = OFFICIAL | {"num_key_value_heads": 8}
    assert decoder_token(OFFICIAL) - decoder_token(grouped) == 2 * 32 * 3072 * 2 * 24 * 96
