"""One optimizer step takes its Batches as they come."""

import time
from types import SimpleNamespace

import pytest
import torch

from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.data.plan import PlannedRow, PlannedStep
from phi3v_dist.observe.metrics import step_row
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.step import train_step

ROWS = tuple(PlannedRow((i,), tokens=4, squared_tokens=16, label_tokens=4, crops=0) for i in range(3))
PLAN = PlannedStep(number=7, rows=ROWS, label_tokens=12, tokens=12, state={})


class Engine:
    """What `train_step` asks of DeepSpeed's engine; writes down the order of calls."""

    device = torch.device("cpu")
    optimizer = SimpleNamespace(param_groups=[], loss_scale=1.0)

    def __init__(self, calls: list[str]):
        self.calls = calls
        self.weight = torch.ones(1, requires_grad=True)

    def __call__(self, **inputs):
        self.calls.append("forward")
        return SimpleNamespace(token_losses=self.weight * torch.ones(4))

    def backward(self, loss, scale_wrt_gas):
        self.calls.append("backward")
        loss.backward()

    def is_gradient_accumulation_boundary(self):
        return self.calls.count("backward") == len(ROWS)

    def step(self):
        self.calls.append("step")

    def get_global_grad_norm(self):
        return float(self.weight.grad.norm())


def batches(calls: list[str], slow_s: float = 0.0):
    for row in ROWS:
        time.sleep(slow_s)
        calls.append("data")
        yield collate(Row((Filling(4, sample_id=row.sample_ids[0], name="shard:key", reason="torn"),)), pad_id=0)


def fake_labels(monkeypatch) -> None:
    monkeypatch.setattr("phi3v_dist.data.batch.Batch.label_tokens", 4)


def test_each_batch_is_asked_for_when_the_one_before_is_done_with(monkeypatch):
    fake_labels(monkeypatch)
    calls: list[str] = []
    result = train_step(Engine(calls), PLAN, batches(calls), {}, Topology())
    assert calls == ["data", "forward", "backward", "step"] * 3  # the last one updates the weights
    assert (result.loss, result.label_tokens, result.quarantined) == (1.0, 12, 3)
    assert [filling.sample_id for filling in result.left_out] == [0, 1, 2]


@pytest.mark.fault(61)
def test_waiting_for_a_slow_loader_is_measured_for_every_batch_and_logged_as_a_share(monkeypatch):
    fake_labels(monkeypatch)
    result = train_step(Engine([]), PLAN, batches([], slow_s=0.1), {}, Topology())
    assert result.data_wait_s == result.seconds["data"] >= 0.3
    row = step_row(result, row_length_tokens=4, world_size=1)
    assert row["data/stall_pct"] == pytest.approx(100 * result.seconds["data"] / row["time/step_s"])
