"""The file of a sweep: what a task adds, what is refused; nothing in it is expanded."""

import pytest

from phi3v_dist.cluster.sweep import added_by, describe, read_tasks
from phi3v_dist.errors import ConfigError


@pytest.fixture
def sweep(tmp_path):
    def write(text: str):
        path = tmp_path / "sweep.txt"
        path.write_text(text)
        return path

    return write


@pytest.mark.fault(93)
def test_words_are_those_of_the_file_whatever_they_would_mean_to_a_shell(sweep):
    path = sweep("# comment\n\nx=$(id) y=`id` z=*  w=$HOME a=b;c\n  x='a b' y=\"c 'd'\" z=e\\ f\n")
    assert read_tasks(path) == [
        ["x=$(id)", "y=`id`", "z=*", "w=$HOME", "a=b;c"],
        ["x=a b", "y=c 'd'", "z=e f"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=1\ny='2\n", r"sweep.txt:2: No closing quotation: y='2"),
        ("--report=/etc\n", r"sweep.txt:1: '--report=/etc' is not key=value"),
        ("x=1 word\n", r"sweep.txt:1: 'word' is not key=value"),
        ("x='a\x1b[2J'\n", r"sweep.txt:1: .* is not key=value"),
        ("# none\n\n", r"has no line of key=value words"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_words_is_named(sweep, text, message):
    with pytest.raises(ConfigError, match=message):
        read_tasks(sweep(text))


def test_no_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: .*No such file"):
        read_tasks(tmp_path / "none.txt")


def test_each_task_has_a_run_of_its_own(sweep, config_file):
    tasks = read_tasks(sweep("run.seed=1\nrun.seed=2 run.name=other\n"))
    assert added_by(0, tasks, str(config_file), []) == ["run.seed=1", "run.name=run-0"]
    assert added_by(0, tasks, str(config_file), ["run.name=given"]) == ["run.seed=1", "run.name=given-0"]
    assert added_by(1, tasks, str(config_file), []) == ["run.seed=2", "run.name=other"]
    with pytest.raises(ConfigError, match=r"no line for task 2: its 2 lines are tasks 0 to 1 \(sbatch --array=0-1\)"):
        added_by(2, tasks, str(config_file), [])


def test_all_mistakes_of_a_sweep_are_shown_before_it_is_submitted(sweep, config_file):
    tasks = read_tasks(sweep("run.sede=1\nrun.name=same\nrun.name=same\n"))
    with pytest.raises(ConfigError) as raised:
        describe(tasks, str(config_file), [])
    first, second = raised.value.problems
    assert first.startswith("task 0: ") and "did you mean `run.seed`?" in first
    assert second.startswith("task 2: trains in ") and second.endswith("as task 1 does")
