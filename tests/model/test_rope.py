"""LongRoPE: cos and sin against transformers' own Phi-3 rotary, and which length chooses the factors."""

import copy
import json
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phi3v_dist import config as settings_of
from phi3v_dist import run
from phi3v_dist.config import LongRopeRule
from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.errors import CheckpointError, ConfigError
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.origin import LONGROPE_KEY, ORIGIN_NAME, recorded_longrope
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.rope import LongRope

RULES = get_args(LongRopeRule)
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
@pytest.mark.supports("longrope document", on="one process")
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


@pytest.mark.parametrize("name", ["phi3_vision", "phi3_5_vision"])
@pytest.mark.parametrize("length", [4096, 4097])
@pytest.mark.parametrize("rule", RULES)
def test_the_real_48_factors_are_those_of_double_precision(assets_folder, name, length, rule):
    """numpy, fp64, from the numbers of config.json alone: 4,096 is short and 4,097 long, unless the rule is fixed."""
    config = json.loads((assets_folder / name / "config.json").read_text())
    is_long = rule == "long" or rule != "short" and length > 4096
    factors = np.array(config["rope_scaling"]["long_factor" if is_long else "short_factor"], dtype=np.float64)
    assert factors.shape == (48,)
    angles = np.arange(length, dtype=np.float64)[:, None] / (factors * 10000.0 ** (np.arange(0, 96, 2) / 96))
    angles = np.concatenate([angles, angles], axis=1)
    magnitude = np.sqrt(1 + np.log(131072 / 4096) / np.log(4096))
    positions, lengths = whole(length)
    cos, sin = LongRope(config, rule)(positions, lengths, torch.float32)
    for found, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        # an angle of 4,096 has a unit of 4.9e-4 in fp32; measured: 5.1e-4. The other list is off by 2.
        assert np.abs(found[0].double().numpy() - magnitude * expected).max() <= 1e-3


@pytest.mark.parametrize("name", ["phi3_vision", "phi3_5_vision"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.supports("longrope others", on="one process")
def test_the_real_models_are_built_under_every_rule(assets_folder, name, rule):
    model = Phi3VForCausalLM.without_weights(read_config(assets_folder / name), rule)
    assert model.rope.rule == model.longrope == rule
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    cos, _ = model.rope(*whole(5), torch.float32)
    assert cos.shape == (1, 5, 96) and torch.allclose(cos[0, 0], torch.tensor(1.190238))


def test_an_unknown_rule_is_refused_with_the_known_ones(tiny_model):
    known = "'longest'.*document, max_position, key_length, short, long"
    with pytest.raises(ConfigError, match=known):
        LongRope(CONFIG, "longest")
    with pytest.raises(ConfigError, match=known):
        Phi3VForCausalLM.from_pretrained(tiny_model, longrope="longest")


def test_another_number_of_factors_than_the_heads_take_is_refused():
    wrong = copy.deepcopy(CONFIG)
    wrong["rope_scaling"]["long_factor"].pop()
    with pytest.raises(CheckpointError, match="'long_factor': 7.*head_dim 16 takes 8"):
        LongRope(wrong)


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
    plain["max_position_embeddings"] = plain["original_max_position_embeddings"]
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


def under(text_model, rule) -> Phi3VForCausalLM:
    model = Phi3VForCausalLM(text_model.config, rule).eval()
    model.load_state_dict(text_model.state_dict())
    return model


def row_of(*lengths: int) -> dict:
    """A training Batch of text documents with the words 3, 4, 5, …"""
    row = dict(collate(Row(tuple(Filling(n) for n in lengths)), pad_id=0).inputs(torch.device("cpu")))
    return row | {"input_ids": torch.cat([torch.arange(3, 3 + n) for n in lengths])[None]}


@torch.no_grad()
def alone(model, length: int) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 3 + length)[None]).logits[0]


@pytest.mark.parametrize(
    ("rule", "short_kept"),
    [("document", True), ("max_position", False), ("key_length", False)],
)
@torch.no_grad()
def test_the_official_rules_let_one_long_document_turn_a_whole_row_long(text_model, rule, short_kept):
    """30 tokens beside 50, original length 40."""
    logits = under(text_model, rule)(**row_of(30, 50), return_logits=True).logits[0]
    assert ((logits[:30] - alone(text_model, 30)).abs().max() < 1e-4) == short_kept
    assert (logits[30:] - alone(text_model, 50)).abs().max() < 1e-4


@torch.no_grad()
def test_key_length_counts_the_packed_row_and_max_position_its_longest_document(text_model):
    """Two documents of 30: the row of 60 is above 40, its positions are not."""
    logits = {rule: under(text_model, rule)(**row_of(30, 30), return_logits=True).logits for rule in RULES}
    assert torch.equal(logits["document"], logits["max_position"])
    assert torch.equal(logits["document"], logits["short"])
    assert torch.equal(logits["key_length"], logits["long"])
    assert (logits["document"] - logits["key_length"]).abs().max() > 1e-3


@pytest.mark.parametrize(("rule", "length_that_agrees", "other"), [("short", 40, 41), ("long", 41, 40)])
@torch.no_grad()
def test_fixed_rules_take_one_list_for_every_document(text_model, rule, length_that_agrees, other):
    fixed = under(text_model, rule)
    assert torch.equal(alone(fixed, length_that_agrees), alone(text_model, length_that_agrees))
    assert (alone(fixed, other) - alone(text_model, other)).abs().max() > 1e-3
    packed = fixed(**row_of(20, 60), return_logits=True).logits[0]
    assert (packed - torch.cat([alone(fixed, 20), alone(fixed, 60)])).abs().max() < 1e-4


# --- the rule of a folder -------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tiny_model, tmp_path):
    """The tiny folder, with what an origin.json may say."""

    def exported(text: str):
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        for path in tiny_model.iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
        (folder / ORIGIN_NAME).write_text(text)
        return folder

    return exported


@pytest.mark.parametrize("rule", RULES)
def test_a_folder_is_read_under_the_rule_it_was_exported_with_unless_told_otherwise(exported, rule):
    folder = exported(json.dumps({"run": "x", LONGROPE_KEY: rule}))
    assert Phi3VForCausalLM.from_pretrained(folder).longrope == rule
    assert Phi3VForCausalLM.from_pretrained(folder, longrope="key_length").longrope == "key_length"


def test_a_folder_that_records_no_rule_is_read_by_document(exported, tiny_model):
    assert recorded_longrope(tiny_model) == recorded_longrope(exported('{"run": "x"}')) == "document"
    assert Phi3VForCausalLM.from_pretrained(tiny_model).longrope == "document"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"longrope": "longest"}', "'longest', which is no LongRoPE rule: it is one of document, max_position"),
        ('{"longrope": ["long"]}', "no LongRoPE rule"),
        ("{", "not JSON"),
        ("[]", "holds list, not an object"),
    ],
)
def test_a_damaged_record_is_named(exported, text, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Phi3VForCausalLM.from_pretrained(exported(text))
    assert ORIGIN_NAME in str(caught.value)


def test_a_run_from_such_a_folder_does_not_change_the_rule_by_silence(exported, config_file):
    folder = exported('{"longrope": "long"}')
    unsaid = settings_of.load(config_file, [f"model.path={folder}"])
    assert [text for text in run.problems(unsaid, 1) if "was trained under long" in text and "longrope=long" in text]
    for rule in ("long", "document"):
        said = settings_of.load(config_file, [f"model.path={folder}", f"model.longrope={rule}"])
        assert run.problems(said, 1) == []
