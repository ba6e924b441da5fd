"""The self-test at start-up refuses a backend that leaks, computes something else or does not run; good ones pass."""

import pytest
import torch
from flash_double import HALF, FlashDouble, Leaking

from phi3v_dist import config, run
from phi3v_dist.attempt.attempt import Attempt
from phi3v_dist.attempt.requests import Requests
from phi3v_dist.errors import ConfigError
from phi3v_dist.model import build
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.isolation import check_isolation

CPU = torch.device("cpu")
PHI3 = {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
ALL_TYPES = (torch.float32, *HALF)


def flash(double: FlashDouble) -> Backend:
    return Backend("flash_attention_2", "a double", double.second)


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize(
    "backend", [Backend("sdpa"), Backend("eager"), flash(FlashDouble(ALL_TYPES))], ids=lambda b: b.name
)
def test_good_backends_pass_in_every_type(backend, dtype):
    found = check_isolation(backend, SMALL, CPU, dtype, 4096)
    assert found.num_documents == 4 and found.eager_difference < 0.04


def test_at_the_real_models_sizes_it_passes_in_moments():
    assert check_isolation(Backend("sdpa"), PHI3, CPU, torch.float32, 131072).num_documents == 4  # 0.2 to 0.4 s


@pytest.mark.parametrize("row_length", [16, 17, 40, 255])
def test_short_rows_are_tested_too(row_length):
    check_isolation(Backend("sdpa"), SMALL, CPU, torch.float32, row_length)
    with pytest.raises(ConfigError, match="see each other"):
        check_isolation(flash(Leaking(ALL_TYPES)), SMALL, CPU, torch.float32, row_length)


class ShiftedBorders(FlashDouble):
    """A document's first token is taken for the last of the one before."""

    def compute(self, q, k, v, edges, scale, causal):
        return super().compute(q, k, v, [0, *(e + 1 for e in edges[1:-1]), edges[-1]], scale, causal)


class LeakingBackward(FlashDouble):
    """Right values; every output sends a gradient to every key."""

    def compute(self, q, k, v, edges, scale, causal):
        everything = k.sum()
        return super().compute(q, k, v, edges, scale, causal) + (everything - everything.detach())


class NotCausal(FlashDouble):
    def compute(self, q, k, v, edges, scale, causal):
        return super().compute(q, k, v, edges, scale, causal=False)


class OtherScale(FlashDouble):
    def compute(self, q, k, v, edges, scale, causal):
        return super().compute(q, k, v, edges, 1.1 * scale, causal)


class Constant(FlashDouble):
    def compute(self, q, k, v, edges, scale, causal):
        return 0 * super().compute(q, k, v, edges, scale, causal)


class Refusing(FlashDouble):
    def compute(self, q, k, v, edges, scale, causal):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    ("double", "message"),
    [
        (Leaking, "lets documents see each other: changing document 1 of 4"),
        (ShiftedBorders, "lets documents see each other"),
        (LeakingBackward, "document 1 of 4 .* sends gradients to others"),
        (NotCausal, "computes something else: its outputs are up to .* from plain attention"),
        (OtherScale, "computes something else"),
        (Constant, "does not read its input"),
        (Refusing, "does not run on the model's sizes: CUDA error: no kernel image is available for execution"),
    ],
)
def test_a_bad_backend_is_refused_with_what_to_do(double, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_isolation(flash(double(ALL_TYPES)), SMALL, CPU, torch.bfloat16, 4096)
    assert "model.attention=sdpa" in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_does_not_start_with_a_backend_that_leaks(config_file, monkeypatch):
    settings = config.load(config_file)
    assert run.problems(settings, world_size=1) == []
    monkeypatch.setattr(build, "choose", lambda *_: flash(Leaking(ALL_TYPES)))
    found = run.problems(settings, world_size=1)
    assert len(found) == 1 and "`model.attention`: flash_attention_2 lets documents see each other" in found[0]
    with pytest.raises(ConfigError, match="see each other"):  # and on every rank, before a weight is read
        run.build(settings, run.Topology(), Attempt(1, settings.run.folder), Requests())
