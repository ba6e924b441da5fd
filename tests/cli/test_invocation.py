"""Help and messages name commands as they were started: scripts in the repository, `phi3v-…` in an installation."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from phi3v_dist.invocation import as_typed, installed

OURS = re.compile(r"launch/(\w+\.py|configs/)")


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("launch/train.py", "python launch/check.py"),
        ("./launch/train.py", "python launch/check.py"),
        ("/somewhere/launch/train.py", "python /somewhere/launch/check.py"),
        ("/venv/bin/phi3v-train", "phi3v-check"),
        ("/venv/lib/python3.11/site-packages/phi3v_dist/cli/train.py", "phi3v-check"),  # python -m
    ],
)
def test_a_command_is_named_as_this_one_was_started(started, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [started])
    assert as_typed("python launch/check.py --nodes 2") == f"{typed} --nodes 2"


def test_with_python_m_the_working_directory_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "phi3v_dist/cli/train.py")])
    monkeypatch.chdir(REPOSITORY)
    assert as_typed("see launch/check.py") == "see launch/check.py"
    monkeypatch.chdir(tmp_path)
    assert as_typed("see launch/check.py") == "see phi3v-check"


@pytest.mark.parametrize(
    ("repository", "installation"),
    [
        ("a folder that launch/train.py made", "a folder that phi3v-train made"),
        ("`python launch/prepare.py index 'x/*.tar'`", "`phi3v-prepare index 'x/*.tar'`"),
        (
            "deepspeed --num_accelerators 2 launch/train.py --config launch/configs/quickstart.yaml",
            "deepspeed --num_accelerators 2 --module phi3v_dist.cli.train --config configs/quickstart.yaml",
        ),
        (
            "torchrun --nnodes 2 \\\n    launch/train.py --config x.yaml",
            "torchrun --nnodes 2 \\\n    --module phi3v_dist.cli.train --config x.yaml",
        ),
        (
            "phi3v-supervise runs/x -- deepspeed launch/train.py --config y.yaml",
            "phi3v-supervise runs/x -- deepspeed --module phi3v_dist.cli.train --config y.yaml",
        ),
        ("srun python launch/doctor.py --config x", "srun phi3v-doctor --config x"),
        ("torchrun is one launcher.\nThen python launch/report.py", "torchrun is one launcher.\nThen phi3v-report"),
        ("parallel.deepspeed=x.json (launch/check.py --nodes 1)", "parallel.deepspeed=x.json (phi3v-check --nodes 1)"),
        ("mylaunch/train.py and launch/other.txt stay", "mylaunch/train.py and launch/other.txt stay"),
    ],
)
def test_how_an_installation_spells_a_command(repository, installation):
    assert installed(repository) == installation


def test_remarks_behind_commands_stay_in_their_column():
    text = "python launch/check.py --json     all\n  python launch/report.py  one\ndeepspeed launch/train.py  two"
    lines = installed(text).split("\n")
    assert lines[0] == "phi3v-check --json                all"
    assert lines[1] == "  phi3v-report             one"
    assert lines[2] == "deepspeed --module phi3v_dist.cli.train  two"


def test_every_message_names_commands_through_the_helper():
    """Docstrings may use the repository's spelling: parsers convert their own."""
    wrong = []
    for path in sorted((REPOSITORY / "phi3v_dist").rglob("*.py")):
        if path.name != "invocation.py" and path.parent.name != "resources":
            wrong += [f"{path.relative_to(REPOSITORY)}:{line}" for line in _bare_names(path)]
    assert not wrong, f"put these in as_typed(…): {', '.join(wrong)}"


def _bare_names(path: Path) -> list[int]:
    """Lines with a text that names one of our commands outside of docstrings and `as_typed(…)`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            allowed.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "as_typed":
            allowed |= set(ast.walk(node))
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return sorted(node.lineno for node in texts if node not in allowed and OURS.search(node.value))


def test_a_bare_name_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""launch/a.py"""\nx = f"{1} see launch/b.py"\ny = as_typed("launch/c.py")\nz = "launch/configs/d"\n'
    )
    assert _bare_names(path) == [2, 4]
