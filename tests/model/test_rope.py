"""LongRoPE: cos and sin against transformers' own Phi-3 rotary, and which length chooses the factors."""

import copy

import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.model.phi3v import Phi3VForCausalLM, read_config
from phi3v_dist.model.rope import LongRope

CONFIG = {
    "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 8192, "rope_theta": 10000.0,
    "original_max_position_embeddings": 64, "rope_scaling": {
        "type": "su", "short_factor": [1.0 + i / 50 for i in range(8)], "long_factor": [1.0 + i * 3 for i in range(8)],
    },
}  # fmt: skip


def upstream(config) -> Phi3RotaryEmbedding:
    """Transformers' rotary of an official config; its own name for "su" is "longrope"."""
    fields = copy.deepcopy({k: v for k, v in config.items() if k in CONFIG})
    fields["rope_scaling"]["type"] = "longrope"
    return Phi3RotaryEmbedding(Phi3Config(**fields, pad_token_id=None))


def whole(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and lengths of one document."""
    return torch.arange(length)[None], torch.full((1, length), length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
def test_one_document_gets_what_upstream_computes_for_a_batch_of_it(length, dtype):
    positions, lengths = whole(length)
    expected = upstream(CONFIG)(torch.zeros(1, dtype=dtype), positions)
    for ours, theirs in zip(LongRope(CONFIG)(positions, lengths, dtype), expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["phi3_vision", "phi3_5_vision"])
@pytest.mark.parametrize("length", [4096, 4097, 131072])
def test_the_real_models_factors_are_upstreams(assets_folder, name, length):
    config = read_config(assets_folder / name)
    positions, lengths = whole(length)
    ends = torch.tensor([0, 1, 777, length - 1])
    expected = upstream(config)(torch.zeros(1), positions)
    ours = LongRope(config)(positions[:, ends], lengths[:, ends], torch.float32)
    assert all(torch.equal(a, b[:, ends]) for a, b in zip(ours, expected, strict=True))
    assert LongRope(config).magnitude == pytest.approx(1.190238, abs=1e-6)  # MODEL.md §3


def test_a_documents_values_do_not_depend_on_its_neighbours():
    rope = LongRope(CONFIG)
    sizes = (30, 100, 64, 65)
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    lengths = torch.cat([torch.full((n,), n) for n in sizes])[None]
    packed = rope(positions, lengths, torch.float32)
    for n, cos, sin in zip(sizes, packed[0].split(sizes, dim=1), packed[1].split(sizes, dim=1), strict=True):
        alone = rope(*whole(n), torch.float32)
        assert torch.equal(cos, alone[0]) and torch.equal(sin, alone[1])


def test_the_length_decides_and_not_the_position():
    rope = LongRope(CONFIG)
    early = torch.tensor([[3, 3]])
    cos, _ = rope(early, torch.tensor([[64, 65]]), torch.float32)
    assert not torch.equal(cos[0, 0], cos[0, 1])


def test_without_scaling_it_is_plain_rope():
    plain = {k: v for k, v in CONFIG.items() if k != "rope_scaling"}
    positions, lengths = whole(500)
    fields = {k: v for k, v in plain.items() if k != "original_max_position_embeddings"}
    expected = Phi3RotaryEmbedding(Phi3Config(**fields, pad_token_id=None))(torch.zeros(1), positions)
    ours = LongRope(plain)(positions, lengths, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_factors_stay_fp32_where_zero_init_makes_all_tensors_bf16(monkeypatch):
    """`torch.tensor` under zero.Init rounds to bf16; at position 8,000 the angles would be off by whole turns."""
    from deepspeed.runtime.zero.partition_parameters import zero_wrapper_for_fp_tensor_constructor

    expected = LongRope(CONFIG)(*whole(60), torch.float32)
    for name in ("tensor", "arange", "ones", "empty", "zeros", "full"):
        wrapped = zero_wrapper_for_fp_tensor_constructor(getattr(torch, name), torch.bfloat16, torch.device("cpu"))
        monkeypatch.setattr(torch, name, wrapped)
    rope = LongRope(CONFIG)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(rope(*whole(60), torch.float32), expected, strict=True))


def test_a_model_built_on_the_meta_device_has_real_factors():
    with torch.device("meta"):
        rope = LongRope(CONFIG)
    expected = LongRope(CONFIG)(*whole(60), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(rope(*whole(60), torch.float32), expected, strict=True))


@pytest.fixture(scope="module")
def text_model(tiny_model):
    config = read_config(tiny_model)
    config["original_max_position_embeddings"] = 40
    torch.manual_seed(0)
    return Phi3VForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("rule", "short_kept"),
    [("document", True), ("max_position", False), ("key_length", False)],
)
@torch.no_grad()
def test_the_official_rules_let_one_long_document_turn_a_whole_row_long(text_model, rule, short_kept):
    """The row is a training Batch: 30 tokens beside 50, original length 40."""
    model = Phi3VForCausalLM(text_model.config, rule).eval()
    model.load_state_dict(text_model.state_dict())
    short, long = torch.arange(3, 33), torch.arange(3, 53)
    row = dict(collate(Row((Filling(30), Filling(50))), pad_id=0).inputs(torch.device("cpu")))
    row["input_ids"] = torch.cat([short, long])[None]
    logits = model(**row, return_logits=True).logits[0]
    alone = text_model(input_ids=short[None]).logits[0]
    together = text_model(input_ids=long[None]).logits[0]
    assert ((logits[:30] - alone).abs().max() < 1e-4) == short_kept
    assert (logits[30:] - together).abs().max() < 1e-4


@torch.no_grad()
def test_key_length_counts_the_packed_row_and_max_position_its_longest_document(text_model):
    """Two documents of 30: the row of 60 is above 40, its positions are not."""
    row = dict(collate(Row((Filling(30), Filling(30))), pad_id=0).inputs(torch.device("cpu")))
    row["input_ids"] = torch.arange(3, 33).repeat(2)[None]
    logits = {}
    for rule in ("document", "max_position", "key_length"):
        model = Phi3VForCausalLM(text_model.config, rule).eval()
        model.load_state_dict(text_model.state_dict())
        logits[rule] = model(**row, return_logits=True).logits
    assert torch.equal(logits["document"], logits["max_position"])
    assert (logits["document"] - logits["key_length"]).abs().max() > 1e-3
