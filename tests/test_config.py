"""Settings: what may be written, and what a person reads when it is wrong."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from phi3v_dist.config import dump, load
from phi3v_dist.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "launch" / "configs").glob("*.yaml"))
SMALLEST = {"model": {"path": "m"}, "data": {"train": [{"shards": "a.tar"}]}, "train": {"steps": 200}}


@pytest.fixture
def write(tmp_path):
    def write(content) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def problems(path, *overrides, check=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, check)
    return caught.value.problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    settings = load(path)
    assert settings.run.name == path.stem
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# yaml-language-server:")]
    assert lines[0].startswith(("# deepspeed", "# torchrun", "# srun", "# sbatch")), "its command comes first"


def test_the_smallest_file_is_completed_with_defaults(write):
    settings = load(write(SMALLEST))
    assert settings.data.train[0].shards == ["a.tar"]
    assert (settings.run.folder, settings.train.rows_per_step, settings.model.longrope) == (
        Path("runs/run"), 8, "document",
    )  # fmt: skip


def test_overrides_win_and_reach_into_lists(write):
    tree = SMALLEST | {"data": {"train": [{"shards": "a.tar"}, {"shards": "b.tar"}]}}
    words = ["train.steps=300", "data.train.1.weight=2", "data.train[0].name=first", "train.learning_rate.text=1e-4"]
    settings = load(write(tree), words)
    assert settings.train.steps == 300
    assert [(s.name, s.weight, s.shards) for s in settings.data.train] == [
        ("first", None, ["a.tar"]), (None, 2.0, ["b.tar"]),
    ]  # fmt: skip
    assert settings.train.learning_rate.text == 1e-4
    assert settings.train.learning_rate.vision == 2e-6


def test_yamls_off_and_null_mean_what_they_say(write):
    path = write(SMALLEST)
    assert load(path, ["data.packing=off"]).data.packing is False
    assert load(path, ["train.steps=null", "train.epochs=2"]).train.epochs == 2.0


def test_a_value_may_hold_equal_signs_and_be_quoted(write):
    settings = load(write(SMALLEST), ["run.name='007'", "data.train.0.prompt='a = {{ b }}'"])
    assert (settings.run.name, settings.data.train[0].prompt) == ("007", "a = {{ b }}")


def test_the_resolved_tree_is_plain_and_loads_again(write, tmp_path):
    settings = load(write(SMALLEST), ["eval.fields.price.pattern='([0-9]+)'"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(dump(settings)))
    assert load(again) == settings
    ran_with = {"versions": {"torch": "2"}, "commit": "abc", "world_size": 2}
    again.write_text(yaml.safe_dump(dump(settings) | {"environment": ran_with}))
    assert load(again) == settings, "the config.yaml of a run folder is a configuration, too"
    again.write_text(yaml.safe_dump(dump(settings) | {"environment": {"commit": "abc"}}))
    with pytest.raises(ConfigError, match="`environment` is not a setting"):
        load(again)


def test_settings_are_frozen(write):
    settings = load(write(SMALLEST))
    with pytest.raises(ValidationError, match="frozen"):
        settings.train.steps = 5


@pytest.mark.fault(82, 84)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "`train.stepz` is not a setting; did you mean `train.steps`?"),
        ("trian.steps=5", "`trian` is not a setting; did you mean `train`?"),
        ("train.learning_rate.txt=1", "did you mean `train.learning_rate.text`?"),
        ("data.rows_per_step=5", "`data.rows_per_step` is not a setting; did you mean `train.rows_per_step`?"),
        ("data.train.0.promt=x", "`data.train.0.promt` is not a setting; did you mean `data.train.0.prompt`?"),
        ("eval.fields={price: {patern: '(.)', pattern: '(.)'}}", "did you mean `eval.fields.price.pattern`?"),
        ("train.zzz=5", "`train.zzz` is not a setting; `train` knows betas, "),
        ("train.steps=ten", "`train.steps` is 'ten': input should be a valid integer"),
        ("train.steps=true", "`train.steps` is True: a number is wanted"),
        ("train.weight_decay=off", "`train.weight_decay` is False: a number is wanted"),
        ("train.steps=2.5", "`train.steps` is 2.5: "),
        ("data.packing=perhaps", "`data.packing` is 'perhaps': input should be a valid boolean"),
        ("model.longrope=longest", "'document', 'max_position', 'key_length', 'short' or 'long'"),
        ("model.attention=flash", "'auto', 'flash_attention_2', 'flash_attention_3', 'sdpa' or 'eager'"),
        ("train.min_lr_frac=1.5", "`train.min_lr_frac` is 1.5: input should be less than or equal to 1"),
        ("train.rows_per_step=0", "`train.rows_per_step` is 0: input should be greater than or equal to 1"),
        ("train.betas=[0.9, 1.0]", "`train.betas.1` is 1.0: input should be less than 1"),
        ("train.grad_clip=.nan", "`train.grad_clip` is nan: input should be a finite number"),
        ("train.learning_rate.text=.inf", "`train.learning_rate.text` is inf: input should be a finite number"),
        ("run.name=007", "`run.name` is 7: input should be a valid string (YAML takes it for a number"),
        ("run.name=../elsewhere", "`run.name` is '../elsewhere': string should match pattern"),
        ("eval.fields={price: {pattern: '('}}", "`eval.fields.price.pattern` is '(': not a regular expression: "),
        ("eval.fields={price: {pattern: 'Price'}}", "it needs a group"),
        ("eval.fields={Full Price: {pattern: '(.)'}}", "`eval.fields.Full Price` is 'Full Price': "),
        ("train", "override 'train' is not key=value"),
        ("=5", "override '=5' is not key=value"),
        ("data.train.7.weight=1", "override 'data.train.7.weight=1' cannot be applied: "),
        ("train.betas=[0.9", "override 'train.betas=[0.9' cannot be applied: "),
    ],
)
def test_one_mistake_gives_one_message(write, override, message):
    found = problems(write(SMALLEST), override)
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "`data` is None: "),
        ({"data": {"train": []}}, "`data.train` is []: list should have at least 1 item"),
        ({"data": {"train": [{"name": "x"}]}}, "`data.train.0.shards` is missing: give it in the YAML file or as"),
        ({"model": {}}, "`model.path` is missing: give it in the YAML file or as model.path=…"),
        ({"model": {"path": 5}}, "`model.path` is 5: input is not a valid path"),
        ({"train": {}}, "`train.steps` or `train.epochs` must be given, one of the two (found steps=None"),
        ({"train": {"steps": 200, "epochs": 1}}, "one of the two (found steps=200, epochs=1.0)"),
        ({"train": {"steps": 100, "warmup_steps": 100}}, "`train.warmup_steps` is 100 but the run has only 100 steps"),
        ({"eval": {"every_steps": 5}}, "`eval.every_steps` is set but `data.validation` names no shards"),
        ({"train": {"steps": 200, "rows_per_step": 8, "gradient_accumulation_steps": 3}}, "is not a multiple of"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_named_once(write, change, message):
    found = problems(write(SMALLEST | change))
    assert len(found) == 1, found
    assert message in found[0]


def test_a_missing_section_is_named(write):
    assert problems(write({"train": {"steps": 200}})) == [
        "`model` is missing: give it in the YAML file or as model=…",
        "`data` is missing: give it in the YAML file or as data=…",
    ]


@pytest.mark.fault(82)
def test_a_mistake_of_the_file_names_its_line_and_one_of_the_command_line_does_not(write):
    data = "data:\n  train:\n    - shards: a.tar\n      wait: 2\n"
    path = write(f"model: {{path: m}}\n{data}train:\n  stepz: 5\n  steps: 200\n")
    assert set(problems(path, "train.epoch=1", "run.seed=x")) == {
        f"`data.train.0.wait` is not a setting; did you mean `data.train.0.weight`? ({path}:5)",
        f"`train.stepz` is not a setting; did you mean `train.steps`? ({path}:7)",
        "`train.epoch` is not a setting; did you mean `train.epochs`?",
        "`run.seed` is 'x': input should be a valid integer, unable to parse string as an integer",
    }


@pytest.mark.fault(84)
def test_all_mistakes_are_shown_together_with_those_of_the_check(write):
    tree = SMALLEST | {"trian": {}, "train": {"steps": 50, "warmup_steps": 100, "rows_per_step": "many", "lr": 1}}
    looked_at = []

    def check(settings):
        looked_at.append(settings)
        return ["the shard is missing"]

    found = problems(write(tree), "eval", "checkpoint.keep=0", check=check)
    assert [message.split(":")[0].split(";")[0] for message in found] == [
        "override 'eval' is not key=value, for example train.steps=100",
        "`train.rows_per_step` is 'many'",
        "`train.lr` is not a setting",
        "`checkpoint.keep` is 0",
        "`trian` is not a setting",
        "`train.warmup_steps` is 100 but the run has only 50 steps",
        "the shard is missing",
    ]
    assert looked_at[0].train.rows_per_step == 8, "defaults stand in for what is wrong"


def test_several_bad_entries_of_one_list_are_all_named(write):
    tree = SMALLEST | {"data": {"train": ["a.tar", {"shards": "b.tar"}, {"shards": "c.tar", "weight": -1}]}}
    found = problems(write(tree))
    assert [message.split(" is ")[0] for message in found] == ["`data.train.0`", "`data.train.2.weight`"]


def test_the_check_runs_on_good_settings_too(write):
    assert problems(write(SMALLEST), check=lambda settings: [f"{settings.model.path} is empty"]) == ["m is empty"]


@pytest.mark.fault(84)
def test_a_missing_file_names_a_near_one(write):
    path = write(SMALLEST)
    assert f"did you mean {path}?" in problems(path.with_name("rum.yaml"))[0]
    assert "no such file" in problems(path.parent / "no-folder" / "x.yaml")[0]


@pytest.mark.parametrize(
    "content",
    ["train: {steps: 1", "train: 1\ntrain: 2\n", "a: ${nowhere}", "model: {path: ???}", "42", "\xff: [", "- a"],
)
def test_what_is_not_a_yaml_tree_is_refused_with_the_files_name(write, content):
    path = write(content)
    found = problems(path)
    assert len(found) == 1
    assert str(path) in found[0]
