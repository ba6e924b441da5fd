"""One optimizer step takes its Batches as they come."""

import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.data.plan import PlannedRow, PlannedStep
from phi3v_dist.errors import OutOfMemoryError, OutOfStepError
from phi3v_dist.observe.metrics import step_row
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.train.step import train_step

ROWS = tuple(PlannedRow((i,), tokens=4, squared_tokens=16, label_tokens=4, crops=0) for i in range(3))
PLAN = PlannedStep(number=7, rows=ROWS, label_tokens=12, tokens=12, state={})


class Engine:
    """What `train_step` asks of DeepSpeed's engine; writes down the order of calls."""

    device = torch.device("cpu")
    optimizer = SimpleNamespace(param_groups=[], loss_scale=1.0, overflow=False)

    def __init__(self, calls: list[str], full: str = ""):
        self.full = full
        self.calls = calls
        self.weight = torch.ones(1, requires_grad=True)

    def __call__(self, **inputs):
        self.calls.append("forward")
        if self.full:
            raise torch.OutOfMemoryError(self.full)
        return SimpleNamespace(token_losses=self.weight * torch.ones(4))

    def backward(self, loss, scale_wrt_gas):
        self.calls.append("backward")
        loss.backward()

    def gradient_accumulation_steps(self):
        return len(ROWS)

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


@pytest.mark.fault(16)
def test_a_full_accelerator_is_reported_with_the_batch_of_that_moment_and_what_to_change():
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB\nmore lines"
    with pytest.raises(OutOfMemoryError) as raised:
        train_step(Engine([], full), PLAN, batches([]), {}, Topology(rank=0, host="node-a"))
    report = raised.value.report()
    assert "rank 0 on node-a, step 7: CUDA out of memory. Tried to allocate 2.00 GiB" in report
    assert "4 tokens in 1 documents, 1 crops of 0 pictures" in report and "more lines" not in report
    assert "data.row_length_tokens" in report and "parallel.sequence" in report
    assert raised.value.exit_code == 9


@pytest.mark.fault(13)
def test_a_step_with_a_batch_too_few_is_no_step(monkeypatch):
    fake_labels(monkeypatch)
    calls: list[str] = []
    with pytest.raises(OutOfStepError, match="rank 0 on here has 2 of the 3 batches of step 7"):
        train_step(Engine(calls), PLAN, islice(batches(calls), 2), {}, Topology(host="here"))
    assert calls.count("step") == 2, "none of them at the boundary"


@pytest.mark.fault(13)
def test_ranks_that_work_on_different_steps_are_named(monkeypatch):
    fake_labels(monkeypatch)
    monkeypatch.setattr(Topology, "sum", lambda self, values: [*values[:-1], 7.0 + 8.0])
    monkeypatch.setattr(Topology, "gather", lambda self, value: [value, ("node-b", 8)])
    with pytest.raises(OutOfStepError, match="rank 0 on node-a at step 7, rank 1 on node-b at step 8"):
        train_step(Engine([]), PLAN, batches([]), {}, Topology(world_size=2, host="node-a"))
