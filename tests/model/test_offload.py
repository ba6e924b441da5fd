"""Activations in host memory: the same gradients to the bit, in few buffers, one layer ahead. On a CPU copies are made
at once, in the order in which a GPU would be given them."""

import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from phi3v_dist.config import Settings
from phi3v_dist.model import build
from phi3v_dist.model.offload import HostActivations, kept_on_host
from phi3v_dist.model.phi3v import Phi3VForCausalLM

CPU = torch.device("cpu")
FILES = Path(__file__).parents[2] / "ds_configs"
NUM_LAYERS, TOKENS, HIDDEN = 5, 24, 16


class Layers(nn.Module):
    """As the decoder runs its layers, with dropout: the recomputation must draw the same numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * HIDDEN, HIDDEN))
            for _ in range(NUM_LAYERS)
        )

    def forward(self, hidden, host=None):
        with kept_on_host(host):
            for layer in self.layers:
                hidden = hidden + checkpoint(layer, hidden, use_reentrant=False)
        return hidden


def gradients(model, host, device=CPU, num_tokens=TOKENS, num_steps=1):
    """After so many forward and backward passes: what the last made of inputs and weights."""
    for step in range(num_steps):
        torch.manual_seed(step)
        model.zero_grad()
        inputs = torch.randn(1, num_tokens, HIDDEN).to(device).requires_grad_()
        model(inputs, host).square().sum().backward()
    return [inputs.grad, *(parameter.grad.clone() for parameter in model.parameters())]


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.supports("offload_activations", on="one process")
def test_gradients_are_equal_to_the_bit_and_buffers_are_used_again_by_every_step():
    model, host = Layers(), HostActivations()
    expected = gradients(model, None, num_steps=3)
    gradients(model, host)
    assert [buffer.memory.nbytes for buffer in host.buffers] == [TOKENS * HIDDEN * 4] * NUM_LAYERS
    places = [buffer.memory.data_ptr() for buffer in host.buffers]
    assert equal(gradients(model, host, num_steps=3), expected)
    assert [buffer.memory.data_ptr() for buffer in host.buffers] == places and host.num_live == 0
    assert host.num_copies_out == 4 * NUM_LAYERS
    assert host.num_copies_back == 4 * (NUM_LAYERS - 1), "the last layer's never left the device"


def test_each_layers_input_comes_back_while_the_layer_after_it_is_at_work(monkeypatch):
    """And leaves the device when the layer after it begins: two are there at a time."""
    host, said = HostActivations(), []
    model = Layers()
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(
            lambda *_, number=number: said.append((number, host.num_copies_out, host.num_copies_back))
        )
    gradients(model, host)
    forward, backward = said[:NUM_LAYERS], said[NUM_LAYERS:]
    assert forward == [(number, number + 1, 0) for number in range(NUM_LAYERS)]
    ahead = [(number, NUM_LAYERS, min(NUM_LAYERS - number, NUM_LAYERS - 1)) for number in reversed(range(NUM_LAYERS))]
    assert backward == ahead, "when layer n is computed again, the input of layer n - 1 is on its way"


def test_between_forward_and_backward_only_the_last_layers_input_is_on_the_device():
    model, host, began_with = Layers(), HostActivations(), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: began_with.append(StorageWeakRef(args[0].untyped_storage())))
    graph = model(torch.randn(1, TOKENS, HIDDEN).requires_grad_() * 1.0, host)
    gone = [storage.expired() for storage in began_with]
    assert gone == [True] * (NUM_LAYERS - 1) + [False]
    assert graph.grad_fn is not None and host.num_live == NUM_LAYERS


class Recorded:
    """Copies as a GPU's side stream is asked for them: each one's number when it begins and when it is waited for."""

    def __init__(self):
        self.asked, self.num_copies = [], 0

    def copying(self):
        self.num_copies += 1
        self.asked.append(f"copy {self.num_copies}")
        return nullcontext()

    def mark(self):
        return self.num_copies

    def wait(self, copy):
        self.asked.append(f"wait {copy}")


def test_a_copy_is_waited_for_before_its_memory_is_freed_or_used_and_only_then():
    model, host, recorded = Layers(), HostActivations(), Recorded()
    model.layers = model.layers[:3]
    host.copies = lambda device: recorded
    hidden = model(torch.randn(1, TOKENS, HIDDEN, requires_grad=True), host)
    assert recorded.asked == ["copy 1", "wait 1", "copy 2", "wait 2", "copy 3"], "a layer's time for each copy"
    recorded.asked.clear()
    hidden.sum().backward()
    assert recorded.asked == ["wait 3", "copy 4", "wait 4", "copy 5", "wait 5"], "each asked for one layer ahead"
    recorded.asked.clear()
    hidden = model(torch.randn(1, TOKENS, HIDDEN, requires_grad=True), host)
    recorded.asked.clear()
    del hidden
    assert recorded.asked == ["wait 8"], "thrown away while its last copy may be in flight"


def test_longer_rows_get_longer_buffers_and_shorter_ones_use_them():
    row_bytes = TOKENS * HIDDEN * 4
    model, host = Layers(), HostActivations(longest_bytes=2 * row_bytes)
    for num_tokens, size in ((TOKENS, row_bytes * 5 // 4), (TOKENS + 6, row_bytes * 5 // 4), (TOKENS - 7, None),
                             (2 * TOKENS, 2 * row_bytes), (2 * TOKENS + 1, 2 * row_bytes + HIDDEN * 4)):  # fmt: skip
        assert equal(gradients(model, host, num_tokens=num_tokens), gradients(model, None, num_tokens=num_tokens))
        assert size is None or {buffer.memory.nbytes for buffer in host.buffers} == {size}
    assert len(host.buffers) == NUM_LAYERS


def test_forward_passes_that_overlap_or_have_no_backward_pass_do_not_disturb_each_other():
    model, host = Layers().eval(), HostActivations()
    first, second = torch.randn(2, 1, TOKENS, HIDDEN).unbind(0)
    alone = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for x in (first, second)]
    sums = [model(x, host).square().sum() for x in (first, second)]
    assert host.num_live == len(host.buffers) == 2 * NUM_LAYERS
    twice = torch.autograd.grad(sums[0], list(model.parameters()), retain_graph=True)
    assert equal(twice, alone[0]) and equal(torch.autograd.grad(sums[0], list(model.parameters())), alone[0])
    assert equal(torch.autograd.grad(sums[1], list(model.parameters())), alone[1])
    model(first, host)
    with torch.no_grad():
        model(first, host)
    sums.clear()
    gc.collect()
    assert host.num_live == 0 and len(host.buffers) == 2 * NUM_LAYERS


def test_the_decoder_keeps_one_buffer_a_layer_and_its_gradients(tiny_model):
    model = Phi3VForCausalLM.from_pretrained(tiny_model).train()
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    host = HostActivations()
    for activations in (None, host):
        model.set_gradient_checkpointing(True, host_activations=activations)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert equal(*found) and len(found[0]) > 10
    assert len(host.buffers) == len(model.model.layers) and host.num_live == 0
    model.eval()(ids)
    assert host.num_copies_out == len(host.buffers), "nothing is kept without a backward pass to come"


def test_on_a_cpu_nothing_of_cuda_is_touched(monkeypatch):
    def refuse(*_):
        raise AssertionError("torch.cuda was used")

    for name in ("Stream", "stream", "current_stream", "cudart", "synchronize", "Event", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    host = HostActivations()
    gradients(Layers(), host)
    gradients(Layers(), host, num_tokens=TOKENS + 1)
    assert host.num_copies_back == 2 * (NUM_LAYERS - 1)


@pytest.mark.parametrize(
    ("checkpointing", "device", "why"),
    [(False, "cuda", "`model.gradient_checkpointing` is off"), (True, "cpu", "there is no GPU"), (True, "cuda", "")],
)
def test_a_setting_without_effect_says_so(settings_tree, monkeypatch, checkpointing, device, why):
    monkeypatch.setattr(build, "chosen_backend", lambda *_: build.Backend("sdpa"))
    tree = settings_tree | {"model": settings_tree["model"] | {"offload_activations": True}}
    tree["model"]["gradient_checkpointing"] = checkpointing
    settings = Settings.model_validate(tree)
    notes = [line for line in build.describe(settings, torch.device(device)) if "offload_activations" in line]
    assert len(notes) == bool(why) and all(
        f"`model.offload_activations` has no effect: {why}" in note for note in notes
    )
    assert (build.host_activations(settings, torch.device(device), 64) is None) == bool(why)


def test_a_disk_that_nothing_uses_is_said_to_be_idle(settings_tree, tmp_path):
    def notes(file):
        chosen = {"nvme": str(tmp_path), "deepspeed": str(FILES / file)}
        lines = build.describe(Settings.model_validate(settings_tree | {"parallel": chosen}), CPU)
        return [line for line in lines if "parallel.nvme" in line]

    (note,) = notes("zero3.json")
    assert note.endswith("zero3.json keeps nothing on a disk") and notes("zero3_nvme.json") == []


def test_without_the_setting_nothing_is_said_or_offloaded(settings_tree):
    settings = Settings.model_validate(settings_tree)
    assert not [line for line in build.describe(settings, CPU) if "offload_activations" in line]
    assert build.host_activations(settings, torch.device("cuda"), 64) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.supports("offload_activations", on="GPU")
def test_on_a_gpu_copies_beside_busy_streams_give_the_same_gradients_and_free_the_device():
    """Rows large enough for copies to be in flight while memory is freed and taken again."""
    device = torch.device("cuda", 0)
    model, host = Layers().to(device), HostActivations()
    for num_tokens in (1_000_000, 700_000, 1_200_000):
        expected = gradients(model, None, device, num_tokens, num_steps=2)
        assert equal(gradients(model, host, device, num_tokens, num_steps=2), expected)
    assert all(buffer.memory.is_pinned() for buffer in host.buffers)
    row_bytes = 1_200_000 * HIDDEN * 4
    held = {}
    for name, activations in (("device", None), ("host", host)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model(torch.randn(1, 1_200_000, HIDDEN, device=device, requires_grad=True), activations)
        held[name] = torch.cuda.memory_allocated() - before
        del out
    assert held["device"] - held["host"] >= (NUM_LAYERS - 2) * row_bytes
