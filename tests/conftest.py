"""Fixtures for all tests: golden numbers, real tokenizer files, and a tiny world (model, shards, settings).

Shapes declared with jaxtyping are checked by beartype while tests run; production pays nothing.
"""

import io
import json
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import fork_server
import transformers.modeling_utils  # noqa: F401
from jaxtyping import install_import_hook

# Large packages come before it: what is first imported from within a hooked module is compiled anew in every process.
install_import_hook("phi3v_dist", "beartype.beartype")  # before the first import of the package

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import webdataset  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

for variable in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):  # defaults of settings
    os.environ.pop(variable, None)
torch.set_num_threads(1)  # two threads on a busy machine wait for each other, ten times slower
TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
ASSETS = Path(os.environ.get("PHI3V_ASSETS", REPOSITORY.parent / "shared" / "phi3v_assets"))
TINY_SIZES = {
    "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "decoder": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None, str]]:
    """What is shown of tasks that may take long: (task, done, total, unit)."""
    from phi3v_dist import progress

    reports: list[tuple[str, int, int | None, str]] = []

    def report(lines: progress._Lines, task: str, done: int, total: int | None, unit: str | None = None) -> None:
        reports.append((task, done, total, unit or lines.unit))

    monkeypatch.setattr(progress._Lines, "report", report)
    return reports


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Recorded outputs of the published code; README.md in it says how they were made."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def assets_folder() -> Path:
    """Phi-3-vision's own tokenizer and config files: `phi3_vision` and `phi3_5_vision`."""
    if not ASSETS.is_dir():
        pytest.skip(f"no Phi-3-vision tokenizer files at {ASSETS}; set PHI3V_ASSETS to their folder")
    return ASSETS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Phi-3-V of 0.2 million parameters in the official layout."""
    from phi3v_dist.model.tiny import write_tiny

    folder = tmp_path_factory.mktemp("tiny") / "model"
    sentences = [f"A {colour} square, Price: 0123456789. What is it? Say hello." for colour in COLOURS]
    write_tiny(folder, sentences, **TINY_SIZES)
    return folder


def picture(colour: str, width: int, height: int, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, file_format)
    return buffer.getvalue()


def write_samples(path: Path, numbers: range) -> Path:
    """A tar of samples through the plain webdataset writer: every fourth is text only, pictures differ in shape."""
    rng = np.random.default_rng(numbers.start)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for n in numbers:
            colour, price = COLOURS[n % 4], int(rng.integers(10, 990))
            question = [{"type": "text", "text": "What is it?"}]
            sample = {"__key__": f"{n:05d}"}
            if n % 4 != 3:
                sample["0.jpg"] = picture(colour, 400 if n % 3 else 300, 300)
                question.insert(0, {"type": "image", "image": "0.jpg"})
            answer = f"A {colour} square, Price: {price}" + " hello" * (n % 5)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            tar.write(sample | {"json": json.dumps({"messages": turns}).encode()})
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Two train shards of unequal size and one for validation."""
    folder = tmp_path_factory.mktemp("shards")
    write_samples(folder / "train-000.tar", range(0, 17))
    write_samples(folder / "train-001.tar", range(100, 123))
    write_samples(folder / "validation-000.tar", range(200, 212))
    return folder


@pytest.fixture
def settings_tree(tiny_model, shards, tmp_path) -> dict:
    """Settings of a short run, as plain data."""
    return {
        "run": {"name": "run", "root": str(tmp_path / "runs")},
        "model": {"path": str(tiny_model), "gradient_checkpointing": False},
        "data": {
            "num_crops": 1, "row_length_tokens": 800, "window_samples": 20,
            "train": [{"shards": str(shards / "train-*.tar")}],
            "validation": [{"shards": str(shards / "validation-*.tar")}],
        },
        "train": {
            "steps": 10, "rows_per_step": 3, "warmup_steps": 2,
            "learning_rate": {"text": 1e-3, "vision": 1e-3, "projector": 1e-3},
        },
        "parallel": {"deepspeed": str(REPOSITORY / "ds_configs/zero3.json")},
        "checkpoint": {"every_steps": 4},
        "eval": {
            "base": False,  # one evaluation fewer a launch; `reference` has it
            "max_new_tokens": 12, "batch_samples": 4, "fields": {
                "colour": {"pattern": "A (.*?) square"}, "price": {"pattern": "Price: ([0-9.]+)", "kind": "number"},
            },
        },
        "observe": {"wandb": "disabled"},
    }  # fmt: skip


@pytest.fixture
def config_file(settings_tree, tmp_path) -> Path:
    """The same as a YAML file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_tree))
    return path


@pytest.fixture(scope="session")
def launched(tiny_model, shards, tmp_path_factory) -> tuple[Path, Path]:
    """As `settings_tree`, for runs that several tests look at: the YAML file, and where run folders are made."""
    tree = settings_tree.__wrapped__(tiny_model, shards, tmp_path_factory.mktemp("launch"))
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, Path(tree["run"]["root"])


@pytest.fixture(scope="session")
def reference(launched) -> Path:
    """The folder of a finished run of it on two ranks, undisturbed."""
    from launching import launch

    config, root = launched
    done = launch("torchrun", config, "run.name=reference", "observe.wandb=offline", "eval.base=true")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "reference"


def environment(**extra: str) -> dict[str, str]:
    """For launched processes: this repository, this interpreter's programs, one thread, no accelerator."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    modules = f"{TESTS / 'site'}{os.pathsep}{REPOSITORY}"  # sitecustomize.py: deprecations of ours are errors
    ours = {"PYTHONPATH": modules, "PATH": programs, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | ours | extra


fork_server.install(environment())
COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.fixture
def all_tests(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """Every test that there is, also slow ones; skips where only some files were asked for."""
    items = request.config.stash[COLLECTED]
    if {item.path for item in items} < set(TESTS.rglob("test_*.py")):
        pytest.skip("only some files of tests were asked for")
    return items


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps all tests for test_fault_table.py, before `-m "not slow"` leaves some out."""
    config.stash[COLLECTED] = list(items)
    if hasattr(config, "workerinput"):  # one of several processes
        from workers import turn

        items.sort(key=lambda item: turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from workers import Scopes

    return Scopes(config, log)


NO_CLUSTER = "the Slurm tests do not run: "


def pytest_terminal_summary(terminalreporter) -> None:
    """Here and not beside the Slurm tests, because with several workers only this file is read by who prints."""
    skipped = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())}
    for reason in sorted(reason for reason in skipped if NO_CLUSTER in reason):
        terminalreporter.section("NOT RUN: the Slurm tests", red=True, bold=True)
        terminalreporter.line("because " + reason.split(NO_CLUSTER, 1)[1])
