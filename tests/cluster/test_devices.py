"""GPUs as nvidia-smi tells of them (a stand-in on PATH), and arithmetic that shows a single wrong number."""

import shlex

import pytest
import torch
from preflight_nodes import place_of

from phi3v_dist.cluster import devices, gpus
from phi3v_dist.cluster.checking import check
from phi3v_dist.config import Settings

TWO = "--query-gpu=index,name,memory.total,memory.used"
GOOD = "0, NVIDIA H100 80GB HBM3, 81559, 4\n1, NVIDIA H100 80GB HBM3, 81559, 521"


def smi(answers) -> str:
    """A shell script that answers as nvidia-smi does; None: it hangs."""
    cases = [
        f"{shlex.quote(words)}*) echo {shlex.quote(text)}; exit {9 if 'fails' in text else 0};;"
        for words, text in (answers or {}).items()
    ]
    if answers is None:
        cases = ["*) exec /bin/sleep 60;;"]
    unknown = "*) echo 'Field is not a valid field to query.'; exit 2;;"
    return "\n".join(["#!/bin/sh", 'case "$1" in', *cases, unknown, "esac"])


@pytest.fixture
def look(settings_tree, tmp_path, monkeypatch):
    """Answers of nvidia-smi → the outcome of the look at GPUs. `torch` sees as many as it is told."""
    place = place_of(Settings.model_validate(settings_tree), "n1", tmp_path, ranks=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "SMI_LIMIT_S", 1.0)
    monkeypatch.setattr(gpus, "FREE_WAIT_S", 0.6)
    monkeypatch.setattr(gpus, "FREE_LOOK_S", 0.1)

    def run(answers, seen=2):
        script = tmp_path / "nvidia-smi"
        script.write_text(smi(answers))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
        return check("GPUs", gpus.gpus, place)

    return run


def test_gpus_that_are_there_and_free_are_fine(look):
    found = look({TWO: GOOD, "--query-gpu=ecc": "0\n0", "--query-gpu=retired": "No\nNo", "--query-remapped": "0\nNo"})
    assert not found.problems and not found.warnings and found.detail == "2 x H100"


@pytest.mark.parametrize(
    "answers, seen, words",
    [
        ({TWO: GOOD.splitlines()[0]}, 1, "nvidia-smi sees 1 GPU, expected 2"),
        ({TWO: GOOD}, 0, "sees 0 GPUs, expected 2"),
        (None, 2, "did not answer within 1 s"),
        ({TWO: GOOD.replace("521", "70123"), "--query-compute": "4711, python"}, 2,
         "GPU 1 (NVIDIA H100 80GB HBM3) is not free: 70,123 of 81559 MiB are in use, by process 4711"),
        ({TWO: GOOD, "--query-gpu=ecc": "0\n3"}, 2, "GPU 1: memory errors that could not be corrected"),
        ({TWO: GOOD, "--query-remapped-rows=remapped_rows.pending": "Yes\nNo"}, 2, "GPU 0: memory rows wait"),
        ({TWO: "it fails: couldn't communicate with the NVIDIA driver"}, 2, "nvidia-smi fails with 9"),
        ({TWO: GOOD, "--query-gpu=compute_mode": "Default\nProhibited"}, 2, "GPU 1: its compute mode lets nobody"),
        ({TWO: GOOD, "--query-gpu=mig": "Enabled\nEnabled"}, 0, "sees 0 GPUs, expected 1"),
        ({TWO: "what?"}, 2, "answers with something else"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_gpus_is_a_problem_that_names_it(look, answers, seen, words):
    found = look(answers, seen)
    assert any(words in problem for problem in found.problems), found.problems


def test_memory_that_an_earlier_start_still_holds_is_waited_for_and_free_gpus_are_not(look, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "FREE_WAIT_S", 30.0)
    held = GOOD.replace("521", "70123")
    real, looks = gpus._listed, []

    def listed():
        looks.append(real())
        (tmp_path / "nvidia-smi").write_text(smi({TWO: GOOD}))
        return looks[-1]

    monkeypatch.setattr(gpus, "_listed", listed)
    found = look({TWO: held})
    assert not found.problems and [gpu.used_mib for its in looks for gpu in its] == ["4", "70123", "4", "521"]
    looks.clear()
    assert not look({TWO: GOOD}).problems and len(looks) == 1


@pytest.mark.parametrize(
    "answers, seen, visible, num_warnings",
    [
        ({TWO: GOOD.replace("521", "70123"), "--query-gpu=mig": "Enabled\nEnabled"}, 1, None, 0),
        ({TWO: GOOD.replace("521", "1400"), "--query-compute": "77, /usr/bin/nvidia-cuda-mps-server"}, 2, None, 1),
        ({TWO: GOOD, "--query-gpu=compute_mode": "Exclusive_Process\nExclusive_Process"}, 2, None, 0),
        ({TWO: GOOD + "\n2, NVIDIA H100 80GB HBM3, 81559, 70123"}, 2, "0,1", 0),
        ({TWO: GOOD + "\n2, NVIDIA H100 80GB HBM3, 81559, 70123", "--query-gpu=uuid": "GPU-a1\nGPU-b2\nGPU-c3"},
         2, "GPU-a1,GPU-b2", 0),
        ({TWO: GOOD + "\n2, NVIDIA H100 80GB HBM3, 81559, 3"}, 3, None, 0),
        ({TWO: GOOD, "--query-gpu=ecc.errors.uncorrected.aggregate": "0\n3"}, 2, None, 1),
        ({TWO: GOOD, "--query-gpu=ecc.errors.uncorrected.volatile": "0\n0",
          "--query-gpu=ecc.errors.uncorrected.aggregate": "0\n3"}, 2, None, 0),
        ({TWO: GOOD, "--query-gpu=clocks_event_reasons.hw_slowdown": "Not Active\nActive"}, 2, None, 1),
    ],
    ids=["instances", "MPS", "exclusive", "others' GPUs", "by UUID", "more than ranks", "no volatile errors",
         "old errors", "new names"],
)  # fmt: skip
def test_healthy_gpus_in_unusual_modes_are_no_problem(look, monkeypatch, answers, seen, visible, num_warnings):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = look(answers, seen)
    assert not found.problems and len(found.warnings) == num_warnings, found


def test_a_throttled_gpu_is_a_warning(look):
    found = look({TWO: GOOD, "--query-gpu=clocks_throttle_reasons.hw_slowdown": "Not Active\nActive"})
    assert not found.problems and "GPU 1: the hardware slows it down" in found.warnings[0]


def test_without_gpus_what_slurm_promised_does_not_count(settings_tree, tmp_path, monkeypatch):
    """A CPU cluster may offer generic resources called gpu."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = check("GPUs", gpus.gpus, place_of(Settings.model_validate(settings_tree), "n1", tmp_path))
    assert not found.problems and found.detail == "none"
    assert gpus.expected_gpus(None, {"SLURM_GPUS_ON_NODE": "4"}, 8) == 4
    assert gpus.expected_gpus(2, {"SLURM_GPUS_ON_NODE": "4"}, 8) == 2
    assert gpus.expected_gpus(None, {}, 8) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_exact_so_that_one_wrong_number_shows(dtype):
    left, right = devices.factors(256)
    expected = left.sum(0).double() @ right.double()
    product = left.to(dtype) @ right.to(dtype)
    assert torch.equal(product.double().sum(0), expected) and product.abs().max() <= 256 / devices.NONZERO_EVERY
    assert set(left.unique().tolist()) == set(right.unique().tolist()) == {-1.0, 0.0, 1.0}
    product[7, 9] += 1
    assert not torch.equal(product.double().sum(0), expected)
    assert torch.tensor(8192 / devices.NONZERO_EVERY, dtype=torch.bfloat16) == 256, "the largest sum on a GPU"
