"""Scores by parts: bins on hand-made cases, names that dashboards take, and a long document through the evaluator."""

import io
import json
import math

import pytest
import torch
import webdataset
from PIL import Image
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi3v_dist.config import EvalSettings, SourceSettings
from phi3v_dist.data.batch import Row, collate
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.importers.catalogue.chapters import LongDocumentSettings
from phi3v_dist.data.importers.documents import write_documents
from phi3v_dist.data.lengths import measure
from phi3v_dist.data.loader import Decoder
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.evaluate.breakdown import Judged, complaints, of_documents, part_of, split_metrics
from phi3v_dist.evaluate.evaluator import Evaluator
from phi3v_dist.evaluate.generate import _Rows, generate
from phi3v_dist.evaluate.score import score_answer
from phi3v_dist.model.attention import IGNORE, Layout
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.observe.metrics import NAME_PATTERN, check
from phi3v_dist.parallel.topology import Topology

QUARTERS = [0, 0.25, 0.5, 0.75, 1]
FIELDS = EvalSettings(fields={"price": {"pattern": "Price: ([0-9]+)", "kind": "number"}}).fields


def judged(price, values, losses=(), by_position=None):
    """An answer to a question whose truth is 100, with summed losses of its tokens."""
    score = score_answer(f"Price: {price}", "Price: 100", FIELDS, stopped=True, num_tokens=3)
    return Judged(score, None, values, float(sum(losses)), len(losses), by_position or {})


@pytest.mark.parametrize(
    ("value", "rule", "part"),
    [
        (0, QUARTERS, "from_0_to_0_25"),
        (0.25, QUARTERS, "from_0_25_to_0_5"),
        (0.9999, QUARTERS, "from_0_75_to_1"),
        (1, QUARTERS, "from_0_75_to_1"),
        (1.01, QUARTERS, None),
        (-0.01, QUARTERS, None),
        (math.nan, QUARTERS, None),
        ("0.3", QUARTERS, None),
        (True, QUARTERS, None),
        (-3, [-10, -1.5, 2], "from_minus_10_to_minus_1_5"),
        (100_000, [0, 4096, 131072], "from_4096_to_131072"),
        (0.00002, [0.00001, 0.1], "from_1e_minus_05_to_0_1"),
        ("COATS", "values", "is_coats"),
        ("Coats & Hats", "values", "is_coats_hats"),
        (3.5, "values", "is_3_5"),
        (True, "values", "is_true"),
    ],
)
def test_a_value_falls_into_its_part(value, rule, part):
    assert part_of(value, rule) == part
    assert part is None or NAME_PATTERN.fullmatch(f"eval/by_x/{part}/loss")


def test_values_that_a_metric_name_cannot_spell_are_told_apart():
    names = {part_of(value, "values") for value in ("Mäntel", "Möntel", "M ntel", "大衣", "裙子", "", "?")}
    assert len(names) == 7
    assert all(NAME_PATTERN.fullmatch(f"eval/by_x/{name}/loss") for name in names)


def test_scores_and_losses_of_parts_are_those_of_a_hand_computation():
    rows = [
        judged(100, {"depth": 0.0, "kind": "a"}, [1.0, 3.0]),
        judged(90, {"depth": 0.1, "kind": "b"}, [2.0]),
        judged(100, {"depth": 1.0}),
        judged(100, {"depth": 7.0, "kind": "a"}, [5.0]),
    ]
    metrics = split_metrics(rows, {"depth": QUARTERS, "kind": "values"})
    check(metrics)
    assert metrics == pytest.approx({
        "eval/by_depth/from_0_to_0_25/samples": 2, "eval/by_depth/from_0_to_0_25/loss": 2.0,
        "eval/by_depth/from_0_to_0_25/field_em/price": 0.5, "eval/by_depth/from_0_to_0_25/price_mae": 5,
        "eval/by_depth/from_0_75_to_1/samples": 1, "eval/by_depth/from_0_75_to_1/field_em/price": 1,
        "eval/by_depth/from_0_75_to_1/price_mae": 0,
        "eval/by_kind/is_a/samples": 2, "eval/by_kind/is_a/loss": 3.0, "eval/by_kind/is_a/field_em/price": 1,
        "eval/by_kind/is_a/price_mae": 0,
        "eval/by_kind/is_b/samples": 1, "eval/by_kind/is_b/loss": 2.0, "eval/by_kind/is_b/field_em/price": 0,
        "eval/by_kind/is_b/price_mae": 10,
    })  # fmt: skip
    assert complaints(rows, {"depth": QUARTERS}) == [
        "`eval.by.depth`: 1 of 4 samples are in no part: they lack the field, or have a value outside the bins"
    ]
    assert "no sample has such a field" in complaints(rows, {"deepth": QUARTERS})[0]
    assert complaints(rows, {"position": QUARTERS}) == []


def test_a_field_with_too_many_values_splits_nothing_and_says_so():
    rows = [judged(100, {"sku": f"s{n}"}) for n in range(30)]
    assert split_metrics(rows, {"sku": "values"}) == {}
    assert "30 different values, more than 24" in complaints(rows, {"sku": "values"})[0]


def test_losses_come_with_the_position_of_the_learned_token_in_its_own_document():
    labels = torch.full((12,), IGNORE)
    labels[[2, 3, 9, 11]] = torch.tensor([7, 8, 9, 5])  # documents of 5, 3 and 4 tokens; the second has no label
    layout = Layout.of([5, 3, 4], labels)
    first, second, third = of_documents(layout, torch.tensor([0.5, 1.0, 2.0, 4.0]))
    assert (first.positions.tolist(), first.losses.tolist()) == ([2, 3], [0.5, 1.0])
    assert second.positions.tolist() == []
    assert (third.positions.tolist(), third.losses.tolist()) == ([1, 3], [2.0, 4.0])
    edges = [0, 2, 3, 10]
    assert first.sums(edges) == {"from_2_to_3": (0.5, 1), "from_3_to_10": (1.0, 1)}
    assert third.sums(edges) == {"from_0_to_2": (2.0, 1), "from_3_to_10": (4.0, 1)}
    rows = [judged(1, {}, by_position=one.sums(edges)) for one in (third, first)]
    metrics = split_metrics(rows, {"position": edges})
    check(metrics)
    assert list(metrics.items()) == [
        ("eval/by_position/from_0_to_2/loss", 2.0), ("eval/by_position/from_2_to_3/loss", 0.5),
        ("eval/by_position/from_3_to_10/loss", 2.5),
    ]  # fmt: skip


def test_a_row_without_labels_has_no_losses():
    layout = Layout.of([3, 2], torch.full((5,), IGNORE))
    assert [len(one.losses) for one in of_documents(layout, torch.zeros(1))] == [0, 0]


@pytest.mark.parametrize(
    "by",
    [
        {"position": "values"},
        {"depth": [0.5]},
        {"depth": [0, 0.5, 0.5]},
        {"depth": [1, 0]},
        {"depth": "bins"},
        {"De-pth": [0, 1]},
    ],
)
def test_bins_that_cannot_be_are_refused(by):
    with pytest.raises(ValidationError):
        EvalSettings(by=by)


@pytest.fixture(scope="module")
def model(tiny_model):
    return Phi3VForCausalLM.from_pretrained(tiny_model)


def evaluator_of(pattern, tiny_model, topology=None, **settings):
    table = ShardTable.open([SourceSettings(shards=str(pattern))])
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)
    lengths = measure(table, processor)
    decoder = Decoder(table, Fetcher(table), processor)
    chosen = EvalSettings(**settings)
    return Evaluator(decoder, lengths, tuple(range(len(table))), chosen, topology or Topology())


def test_a_long_document_goes_through_the_whole_evaluation(tmp_path, tiny_model, model, monkeypatch):
    """Documents beyond LongRoPE's original length. Memory grows with the length, never with its square, and no logits
    are made but of the prompts' ends: else 100,000 tokens would not fit."""
    settings = LongDocumentSettings(
        train_documents=0, validation_documents=3, document_tokens=(4800,), text_tokens_per_page=300,
        pages_per_question=3, image_side_px=(64, 80),
    )  # fmt: skip
    write_documents(tmp_path / "long", settings, tiny_model)
    seen = []
    monkeypatch.setattr(model.lm_head, "forward", spy(model.lm_head, seen))
    by = {"depth": QUARTERS, "num_tokens": [0, 4096, 8192], "source": "values", "position": [0, 2400, 4800]}
    evaluator = evaluator_of(
        tmp_path / "long" / "*.tar", tiny_model, by=by, max_new_tokens=2, batch_tokens=10_000,
        fields={"category": {"pattern": "Category: (.*?),"}},
    )  # fmt: skip
    assert evaluator._batches(evaluator.sample_ids) == [[0, 1], [2]]
    monkeypatch.setattr("phi3v_dist.evaluate.evaluator.local_copy", lambda same: same)
    with Shapes() as shapes:
        metrics = evaluator.run(model, tmp_path / "eval")
    check(metrics)
    assert max(seen) < 400, "the head saw label tokens and ends alone"
    assert any(max(shape, default=0) > 4700 for shape in shapes.seen), "the document was seen"
    vocab = len(model.lm_head.weight)
    assert not [shape for shape in shapes.seen if sum(size > 4000 for size in shape) > 1], "length x length"
    assert not [shape for shape in shapes.seen if vocab in shape and max(shape) > 4000], "length x vocabulary"
    assert metrics["eval/by_num_tokens/from_4096_to_8192/samples"] == 3
    assert [metrics.get(f"eval/by_depth/{part}/samples") for part in ("from_0_to_0_25", "from_0_25_to_0_5")] == [
        1,
        None,
    ]
    assert metrics["eval/blind/by_source/is_validation_documents/samples"] == 3
    rows = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        fields = evaluator.decoder.sample(row["sample_id"]).fields
        assert row["by"] == {name: fields[name] for name in ("depth", "num_tokens")} | {"source": row["source"]}
    example = evaluator.decoder.processor.encode(evaluator.decoder.sample(2))
    alone = model(**collate(Row((example,)), 0).inputs(torch.device("cpu")))
    assert rows[2]["loss"] == pytest.approx(alone.loss.item(), abs=1e-5)
    halves = [metrics[f"eval/by_position/from_{part}/loss"] for part in ("0_to_2400", "2400_to_4800")]
    assert min(halves) < metrics["eval/loss"] < max(halves)


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.seen |= {tuple(one.shape) for one in tree_leaves(result) if isinstance(one, torch.Tensor)}
        return result


def spy(head, seen):
    """The head's forward, noting at how many positions it was asked."""
    own = head.forward

    def forward(hidden, targets=None):
        seen.append(hidden.numel() // hidden.shape[-1])
        return own(hidden, targets)

    return forward


def test_samples_without_answers_are_evaluated_without_making_logits(tmp_path, tiny_model, model):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(buffer, "PNG")
    turns = [{"role": "user", "content": "What is it?"}]
    with webdataset.TarWriter(str(tmp_path / "v-0.tar"), mtime=0) as tar:
        tar.write({"__key__": "0", "0.png": buffer.getvalue(), "json": json.dumps({"messages": turns}).encode()})
    metrics = evaluator_of(tmp_path / "v-0.tar", tiny_model, max_new_tokens=2).run(model, None)
    assert "eval/loss" not in metrics and metrics["eval/samples"] == 1


def test_a_long_prompt_is_not_kept_while_it_is_answered_unless_its_factors_may_change(tiny_model, model):
    processor = Phi3VProcessor.from_pretrained(tiny_model, num_crops=1)

    def prompt(num_tokens):
        example = processor.encode_prompt([], [])
        return type(example)(0, torch.full((num_tokens,), 30), torch.full((num_tokens,), IGNORE), example.pixel_values,
                             example.image_sizes)  # fmt: skip

    original = model.rope.original_length
    prompts = [prompt(20), prompt(original - 2), prompt(original + 1)]
    with torch.inference_mode():
        rows = _Rows(model, prompts, 5)
        rows.prefill(range(3))
        rows.forget(5)
    assert [bool(pieces) for pieces in rows.embeds] == [False, True, False]
    alone = [generate(model, [one], 5, [])[0] for one in prompts]
    assert generate(model, prompts, 5, []) == alone, "the one that crosses is prefilled again from what was kept"
