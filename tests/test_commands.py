"""Commands and links of README and docs: programs know the options, settings load, files are there."""

import re
from pathlib import Path

import pytest
from commands import Command, check, commands_of
from conftest import REPOSITORY

PAGES = [
    REPOSITORY / "README.md", REPOSITORY / "slurm/README.md", REPOSITORY / "tests/slurm/README.md",
    REPOSITORY / "ds_configs/README.md", *sorted((REPOSITORY / "docs").glob("*.md")),
]  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
FOLDERS, ENDINGS = "launch|slurm|docs|ds_configs|phi3v_dist|tests", "py|yaml|sh|json|md|txt|def|j2"
NAMED_FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+\.(?:{ENDINGS}))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_each_command_of_a_page_is_one_that_its_program_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    wrong = []
    for command in commands_of(page):
        try:
            check(command)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_links_to_or_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"links to nothing: {missing}"
    named = {name for name in NAMED_FILE.findall(text) if not (REPOSITORY / name).exists()}
    assert named <= {"launch/configs/mine.yaml"}, f"there is no {', '.join(sorted(named))}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("python launch/train.py --config launch/configs/quickstart.yaml train.stepps=3", "`train.stepps`"),
        ("python launch/check.py --config launch/configs/quickstart.yaml --nodez 2", "unrecognized arguments: --nodez"),
        ("python launch/gone.py", "there is no launch/gone.py"),
        ("python launch/train.py --config launch/configs/gone.yaml", "there is no launch/configs/gone.yaml"),
        ("deepspeed --num_acelerators 2 launch/train.py --config launch/configs/icons.yaml", "num_acelerators"),
        ("torchrun --nproc_per_nodes 2 launch/train.py --config launch/configs/icons.yaml", "nproc_per_nodes"),
        ("phi3v-trainer --config x", "no command phi3v-trainer"),
        ("torchrun --module phi3v_dist.cli.gone --config x.yaml", "there is no launch/gone.py"),
        ("deepspeed --module phi3v_dist.cli.train --config x.yaml trian.steps=3", "`trian"),
        ("make trian", "no target trian"),
        ("sbatch slurm/train.sh launch/configs/icons.yaml trian.steps=3", "`trian"),
        ("python launch/prepare.py import x.csv --out y imagez=z", "`imagez`"),
        ("python launch/prepare.py sample --out y num_produts=3", "`num_produts`"),
        ("A=1 pyhton launch/train.py", "what is 'pyhton'?"),
        ("PHI3V_FAULT=x phi3v-supervise runs/x -- deepspeed launch/train.py --config y.yaml a.b=1", "`a`"),
    ],
)
def test_a_slip_in_a_command_is_found(text: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(reason)):
        check(Command(REPOSITORY / "README.md", 1, text, ""))


def test_commands_are_read_as_they_are_typed() -> None:
    text = "```bash\n# first\nA='x # y' b \\\n    c  # remark\n\n```\n```text\nno\n```\n```\n$ d e\noutput\n```\n"
    found = [(command.text, command.note, command.line) for command in commands_of(REPOSITORY / "README.md", text)]
    assert found == [("A='x # y' b      c", "remark", 3), ("d e", "", 11)]
