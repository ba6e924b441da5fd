"""Which backend is chosen or refused and what a person reads; the varlen path through a double of flash-attn."""

import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, environment
from flash_double import FlashDouble

from phi3v_dist.data.batch import Filling, Row, collate
from phi3v_dist.errors import ConfigError
from phi3v_dist.model import phi3v
from phi3v_dist.model.backends import FLASH, Backend, choose
from phi3v_dist.model.isolation import check_isolation
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.phi3v import Phi3VForCausalLM

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BOTH = ["flash_attention_2", "flash_attention_3"]
PHI3 = {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32}


@pytest.fixture
def machine(monkeypatch):
    """A machine as the choice sees it: its GPU's compute capability, and what importing each flash-attn gives."""

    def machine(capability=(9, 0), second=None, third=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name, double, generation in (("flash_attn", second, 2), ("flash_attn_interface", third, 3)):
            monkeypatch.setitem(sys.modules, name, double and double.module(generation))  # None: not installed

    return machine


def refusal(name, device=CUDA, dtype=torch.bfloat16, head_dim=96) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(name, device, dtype, head_dim)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    assert "model.attention=auto" in caught.value.problems[0], "what to change"
    return caught.value.problems[0]


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "second", "third", "expected"),
    [
        ((9, 0), True, True, "flash_attention_3"),
        ((9, 0), True, False, "flash_attention_2"),
        ((8, 0), True, True, "flash_attention_2"),  # 3 is compiled for Hopper alone
        ((10, 0), True, True, "flash_attention_2"),
        ((10, 0), False, True, "sdpa"),
        ((7, 5), True, True, "sdpa"),
        ((9, 0), False, False, "sdpa"),
    ],
)
def test_auto_takes_the_newest_that_runs_and_says_why_not_the_others(machine, capability, second, third, expected):
    machine(capability, second and FlashDouble(), third and FlashDouble())
    backend = choose("auto", CUDA, torch.bfloat16, 96)
    assert backend.name == expected
    assert (backend.kernel is None) == (expected == "sdpa")
    better = ["flash_attention_3", "flash_attention_2", "sdpa"]
    for name in better[: better.index(expected)]:
        assert f"not {name}, for" in backend.why


@pytest.mark.parametrize("name", BOTH)
def test_one_asked_for_by_name_is_the_installed_kernel(machine, name):
    doubles = {"flash_attention_2": FlashDouble(), "flash_attention_3": FlashDouble()}
    machine((9, 0), *doubles.values())
    backend = choose(name, CUDA, torch.bfloat16, 96)
    assert backend.name == name
    assert backend.kernel.__self__ is doubles[name]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.supports("attention of torch", on="one process")
def test_torchs_own_run_anywhere(name):
    assert choose(name, CPU, torch.float32, 100) == Backend(name)


@pytest.mark.fault(85)
def test_auto_without_a_gpu_is_sdpa_and_says_so():
    backend = choose("auto", CPU, torch.float32, 96)
    assert (backend.name, backend.why) == ("sdpa", "chosen by auto: flash-attn needs a GPU, this is cpu")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.fault(85)
def test_what_is_not_installed_is_named_with_its_installation(machine, name):
    machine()
    text = refusal(name)
    assert f"`model.attention` is {name}" in text and "is not installed" in text and FLASH[name].install in text


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": CPU}, "there is no GPU (the device is cpu)"),
        ({"dtype": torch.float32}, "compute is float32, which it does not know (model.dtype=bf16)"),
        ({"head_dim": 264}, "head_dim is 264, not a multiple of 8 up to 256"),
        ({"head_dim": 100}, "head_dim is 100"),
    ],
)
def test_what_an_installed_kernel_cannot_do_is_refused(machine, name, change, message):
    machine((9, 0), FlashDouble(), FlashDouble())
    assert message in refusal(name, **change)


@pytest.mark.parametrize(("name", "capability"), [(BOTH[0], (7, 5)), (BOTH[1], (8, 9)), (BOTH[1], (10, 0))])
def test_a_gpu_of_another_kind_is_refused(machine, name, capability):
    machine(capability, FlashDouble(), FlashDouble())
    assert f"compute capability is {capability[0]}.{capability[1]}" in refusal(name)


def test_all_reasons_are_given_together(machine):
    machine((7, 0))
    text = refusal("flash_attention_2", dtype=torch.float32, head_dim=300)
    for word in ("7.0", "float32", "300", "not installed"):
        assert word in text


BROKEN = {
    "another torch's symbols": "raise ImportError('flash_attn_2_cuda.so: undefined\\n symbol: _ZN3c105ErrorC2')",
    "a missing part": "import flash_attn_2_cuda_of_no_machine",
    "a missing library": "raise OSError('libcudart.so.11.0: cannot open shared object file')",
    "another generation": "",  # flash-attn 4 installs a module of this name without the function
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_an_installed_but_broken_one_is_refused_with_its_cause_and_passed_over_by_auto(
    machine, monkeypatch, tmp_path, code
):
    machine((8, 0))
    (tmp_path / "flash_attn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    cause = {"": "flash_attn_varlen_func", "import ": "flash_attn_2_cuda_of_no_machine"}.get(
        code[:7], "undefined symbol: _ZN3c105ErrorC2" if "symbol" in code else "libcudart.so.11.0"
    )
    text = refusal("flash_attention_2")
    assert cause in text and f"torch {torch.__version__}" in text and "pip uninstall flash-attn" in text
    backend = choose("auto", CUDA, torch.bfloat16, 96)
    assert backend.name == "sdpa" and cause in backend.why
    sys.modules.pop("flash_attn", None)


def test_an_unknown_name_is_refused_with_the_known_ones(tiny_model):
    for make in (lambda: choose("flash", CPU, torch.float32, 96), lambda: model_of(tiny_model, "flash")):
        with pytest.raises(ConfigError, match="'flash'.*auto, flash_attention_2, flash_attention_3, sdpa, eager"):
            make()


def model_of(folder, attention) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(folder, attention=attention)


def test_a_model_decides_once(tiny_model, monkeypatch):
    calls = []
    monkeypatch.setattr(phi3v, "choose", lambda *arguments: calls.append(arguments) or Backend("sdpa"))
    model = model_of(tiny_model, "auto")
    for _ in range(3):
        model(torch.arange(5)[None])
    assert calls == [("auto", CPU, torch.float32, 32)]


def test_a_model_refuses_where_it_cannot_run(tiny_model):
    with pytest.raises(ConfigError, match="there is no GPU"):
        model_of(tiny_model, "flash_attention_2")(torch.arange(5)[None])


@pytest.mark.fault(85)
def test_asked_for_without_flash_attn_a_run_ends_with_one_line(config_file):
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--config", str(config_file), "model.attention=flash_attention_2"],
        cwd=REPOSITORY, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == ConfigError.exit_code
    lines = [line for line in done.stderr.splitlines() if "flash_attention_2" in line]
    assert len(lines) == 1 and "there is no GPU" in lines[0] and "model.attention=auto" in lines[0]
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_auto_took(config_file):
    done = subprocess.run(
        [sys.executable, "launch/check.py", "--config", str(config_file)],
        cwd=REPOSITORY, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "attend   sdpa, chosen by auto: flash-attn needs a GPU, this is cpu" in done.stdout


# --- the varlen path -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def model(request, tiny_model):
    torch.manual_seed(0)
    config = read_config(tiny_model) | {"num_attention_heads": 4, "num_key_value_heads": request.param}
    config["rope_scaling"] = {key: value[:8] for key, value in config["rope_scaling"].items()}  # "su" stays whole
    model = Phi3VForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model


def packed_row() -> dict:
    """Text documents of 30, 1, 50 and 7 tokens, every one of them learned."""
    lengths = (30, 1, 50, 7)
    row = dict(collate(Row(tuple(Filling(n) for n in lengths)), pad_id=0).inputs(CPU))
    row.pop("layout")
    row["input_ids"] = torch.randint(3, 300, (1, 88), generator=torch.Generator().manual_seed(1))
    return row | {"labels": row["input_ids"].clone()}


FORMS = {
    "flash_attention_2": ("flash_attention_2", False),
    "flash_attention_3": ("flash_attention_3", False),
    "flash_attention_3 before 9/2025": ("flash_attention_3", True),
}


@pytest.mark.parametrize(("name", "with_lse"), FORMS.values(), ids=FORMS)
def test_losses_and_gradients_through_varlen_are_those_of_sdpa(machine, model, name, with_lse):
    double = FlashDouble((torch.float32,), with_lse)  # fp32, which no real one takes, so that little hides in rounding
    machine((9, 0), double, double)
    results = []
    for backend in (Backend("sdpa"), choose(name, CUDA, torch.bfloat16, 16)):
        model.attention = backend
        model.zero_grad()
        output = model(**packed_row(), return_logits=True)
        output.loss.backward()
        results.append((output.logits.detach(), model.model.layers[0].self_attn.qkv_proj.weight.grad.clone()))
    assert double.calls == 2, "once per layer"
    (logits, gradient), (varlen_logits, varlen_gradient) = results
    assert (varlen_logits - logits).abs().max() <= 5e-5  # measured: 7e-6, values up to 7
    assert (varlen_gradient - gradient).norm() <= 1e-5 * gradient.norm()  # measured: 1.7e-6


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_in_bf16_varlen_is_as_near_to_fp32_as_sdpa_is(machine, model, name):
    machine((9, 0), FlashDouble(), FlashDouble())
    model.attention = Backend("sdpa")
    exact = model(**packed_row(), return_logits=True).logits
    half = Phi3VForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    differences = []
    for backend in (Backend("sdpa"), choose(name, CUDA, torch.bfloat16, 16)):
        half.attention = backend
        differences.append((half(**packed_row(), return_logits=True).logits - exact).abs().mean().item())
    assert differences[1] <= 1.1 * differences[0]  # measured: 0.99 to 1.01


@torch.no_grad()
def test_padded_rows_take_the_same_path(machine, model):
    double = FlashDouble((torch.float32,))
    machine((9, 0), double)
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(40) < torch.tensor([[40], [25], [1]])
    logits = []
    for backend in (Backend("sdpa"), choose("flash_attention_2", CUDA, torch.bfloat16, 16), Backend("eager")):
        model.attention = backend
        logits.append(model(ids, attention_mask=mask.long()).logits)
    assert double.calls == 2
    assert (logits[1] - logits[0]).abs().max() <= 5e-5 and (logits[2] - logits[0]).abs().max() <= 5e-5


@torch.no_grad()
def test_a_layout_that_is_not_the_rows_is_refused(model):
    """flash-attn's kernels would read past the borders, or not at all."""
    model.attention = Backend("sdpa")
    row = dict(collate(Row((Filling(30), Filling(10))), pad_id=0).inputs(CPU))
    other = collate(Row((Filling(30), Filling(9))), pad_id=0).layout
    with pytest.raises(ValueError, match="documents of 39 tokens do not fill"):
        model(**row | {"layout": other})
    for more in ({"attention_mask": torch.ones(1, 40)}, {"labels": row["input_ids"]}, {"position_ids": None}):
        with pytest.raises(ValueError, match="a layout goes with position_ids and one flat row"):
            model(**row | more)


def chosen_on_a_gpu(name, head_dim):
    """The backend, or a skip with the reason why this machine has it not."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        return choose(name, CUDA, torch.bfloat16, head_dim)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*BOTH, "sdpa", "auto"])
@pytest.mark.supports("flash-attn", "attention of torch", on="GPU")
def test_on_a_gpu_the_real_kernel_keeps_documents_apart_and_equals_eager(name):
    backend = chosen_on_a_gpu(name, 96)
    for kv_heads in (32, 8):
        found = check_isolation(backend, PHI3 | {"num_key_value_heads": kv_heads}, CUDA, torch.bfloat16, 4096)
        assert found.num_documents == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_on_a_gpu_a_model_is_as_near_to_fp32_as_sdpa_is(name, model):
    backend = chosen_on_a_gpu(name, 16)
    model.attention = Backend("sdpa")
    exact = model(**packed_row(), return_logits=True).logits
    half = Phi3VForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(CUDA, torch.bfloat16)
    row = {key: value.to(CUDA) for key, value in packed_row().items()}
    differences = []
    for attention in (Backend("sdpa"), backend):
        half.attention = attention
        differences.append((half(**row, return_logits=True).logits.cpu() - exact).abs().mean().item())
    assert differences[1] <= 1.2 * differences[0]
