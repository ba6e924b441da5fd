"""The steps of a window → MFU, FLOPs by part, lengths and mix, against numbers worked out by hand."""

import numpy as np
import pytest

from phi3v_dist.config import PartsSettings, SourceSettings
from phi3v_dist.data.plan import Lengths, PlannedRow, PlannedStep
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.model.flops import flops
from phi3v_dist.observe.window import Step, Whole, label
from phi3v_dist.planner.gpus import gpu_of
from phi3v_dist.train.laps import Lapped
from phi3v_dist.train.step import StepResult

EXACT = 1e-6  # what the issue asks for; the sums are whole numbers, so the difference is rounding alone

# A toy: two layers, hidden 8, heads 2 of 4, feed-forward 16, vocabulary 10; CLIP of two layers, of which one is used,
# hidden 4, feed-forward 8.
TOY = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10,
    "img_processor": {"clip_config": {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2,
                                      "num_attention_heads": 1}},
}  # fmt: skip
# Documents of 30 and 50 tokens in a row with 3 crops, one of 20 in another; two ranks, steps of half a second.
ROWS = (PlannedRow((0, 1), 80, 30**2 + 50**2, 9, crops=3), PlannedRow((2,), 20, 20**2, 4, crops=0))
ALL = PartsSettings()
STEP_S, WORLD_SIZE, PEAK = 0.5, 2, 4e9
# By hand. Matrices of a decoder layer: q, k, v and output 4 · 8 · 8 = 256; gate, up and down 3 · 8 · 16 = 384. Two
# layers and the head (8 · 10): 2 · 640 + 80 = 1,360 weights; 6 operations a weight and token, 100 tokens.
TEXT = 6 * 1_360 * 100
# Attention between tokens, full: 12 · layers · hidden · length², of each document by itself.
ATTENTION_FULL = 12 * 2 * 8 * (30**2 + 50**2 + 20**2)
# A crop has 24 · 24 = 576 patches of 14 · 14 · 3 = 588 values, and 577 tokens. Forward: patches 2 · 588 · 4 · 576; the
# one layer 2 · (4 · 4² + 2 · 4 · 8) · 577 for its matrices and 4 · 4 · 577² for its attention.
TOWER = 2 * 588 * 4 * 576 + 2 * 128 * 577 + 16 * 577**2
# Projector: 4 · 4 = 16 values to 8, and 8 to 8, for each of 144 tokens.
PROJECTOR = 2 * (16 * 8 + 8 * 8) * 144


def whole(parts: PartsSettings = ALL, peak: float | None = PEAK, shares=(1,)) -> Whole:
    tokens = np.array([30, 50, 20])
    lengths = Lengths(tokens, tokens, tokens, full_tokens=tokens, bad={})
    names = ["Street Photos", "scans"]
    sources = tuple(SourceSettings(shards=[f"{n}.tar"], name=names[n]) for n in range(len(shares)))
    table = ShardTable(sources, ("0.tar", "1.tar"), np.array([0, 2, 3]), np.array([0, len(shares) - 1]))
    return Whole(flops(TOY, parts), WORLD_SIZE, peak, lengths, table, shares, grad_clip=1.0)


def step(number: int = 1, grad_norm: float = 0.5, **facts) -> Step:
    result = StepResult(
        step=number, loss=1.0, grad_norm=grad_norm, learning_rates={}, label_tokens=13, tokens=100, images=2, samples=3,
        quarantined=0, sample_ids=(0, 1, 2), rows=2, image_tokens=40, **facts,
    )  # fmt: skip
    return Step(PlannedStep(number, ROWS, 13, 100, {}), result, Lapped({}, STEP_S, ()))


def test_mfu_is_what_one_works_out_by_hand_in_both_conventions():
    row = whole().row([step(1), step(2)], STEP_S)
    vision = 3 * 3 * (TOWER + PROJECTOR)  # forward and twice backward, of three crops
    per_process = STEP_S * WORLD_SIZE
    assert row["perf/mfu"] == pytest.approx((TEXT + ATTENTION_FULL + vision) / per_process / PEAK, rel=EXACT)
    assert row["perf/mfu_causal"] == pytest.approx((TEXT + ATTENTION_FULL / 2 + vision) / per_process / PEAK, rel=EXACT)
    assert row["perf/tflops_text"] == pytest.approx(TEXT / per_process / 1e12, rel=EXACT)
    assert row["perf/tflops_attn"] == pytest.approx(ATTENTION_FULL / 2 / per_process / 1e12, rel=EXACT)
    assert row["perf/tflops_vision"] == pytest.approx(vision / per_process / 1e12, rel=EXACT)
    share = ATTENTION_FULL / 2 / (TEXT + ATTENTION_FULL / 2 + vision)
    assert row["perf/attn_flops_frac"] == pytest.approx(share, rel=EXACT)


def test_what_is_frozen_or_adapted_counts_as_such():
    """A frozen tower goes forward only; text with adapters forward and back to its inputs, but to no weight."""
    row = whole(PartsSettings(text="lora", vision="frozen", projector="full")).row([step()], STEP_S)
    per_process = STEP_S * WORLD_SIZE * 1e12
    assert row["perf/tflops_text"] == pytest.approx(TEXT * 4 / 6 / per_process, rel=EXACT)
    # The projector has nothing trained below it: forward, and the gradient of its weights, for which its second matrix
    # also passes one on.
    assert row["perf/tflops_vision"] == pytest.approx(3 * (TOWER + 3 * PROJECTOR) / per_process, rel=EXACT)


def test_without_a_peak_there_is_no_mfu_but_work_by_part():
    row = whole(peak=None).row([step()], STEP_S)
    assert "perf/mfu" not in row and "perf/mfu_causal" not in row and row["perf/tflops_text"] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12), ("NVIDIA B200", 2250e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_board_and_not_of_its_cousins(name, peak):
    gpu = gpu_of(name)
    assert (gpu and gpu.flops) == peak


def test_lengths_are_those_of_documents_and_clipped_steps_are_counted():
    steps = [step(1, grad_norm=2.0), step(2), step(3, grad_norm=2.0, skipped="its loss is nan")]
    row = whole().row(steps, STEP_S)
    assert (row["seq/len_p50"], row["seq/len_max"]) == (30, 50)
    assert row["train/clip_frac"] == pytest.approx(1 / 3)
    assert row["data/images_per_sample"] == pytest.approx(2 / 3) and row["data/image_tokens_frac"] == 0.4


def test_the_mix_is_by_source_and_drifts_from_what_was_asked_for():
    both = whole(shares=(1, 1))
    for _ in range(2):
        row = both.row([step()], STEP_S)
        assert row["data/mix/street_photos"] == pytest.approx(2 / 3)
        assert row["data/mix_drift/scans"] == pytest.approx(1 / 3 - 1 / 2)
    assert not [name for name in whole().row([step()], STEP_S) if "mix" in name]


@pytest.mark.parametrize(("name", "wanted"), [("Gpu-Node.07", "gpu_node_07"), ("写真", "unnamed"), ("_a_", "a")])
def test_any_name_becomes_a_part_of_a_metrics_name(name, wanted):
    assert label(name) == wanted
