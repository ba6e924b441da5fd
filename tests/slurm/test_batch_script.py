"""slurm/*.sh with stand-ins for Slurm's programs, containers and Python: what would be launched, and what is refused.

Needs no Slurm. What each stand-in was started with is recorded word by word.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, environment

RECORDS = """#!/bin/bash
# stands in for a program: writes down its name and words; answers for phi3v_dist.cli.job
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$RECORD"
for word in "$@"; do
  case $word in
  begin) printf 'run=%s\\naction=begin\\ncode=0\\n' "$RUN" ;;
  nodes) printf 'action=train\\nuse=node1\\nbad=\\ncode=2\\n' ;;
  judge) printf 'action=done\\ncode=0\\n' ;;
  esac
done
"""
SQUEUE = '#!/bin/sh\ncase "$*" in *%N) echo node1 ;; *%L) echo 1:00:00 ;; esac\n'
HARM = [
    "run.name=$(touch fired)",
    "x=`touch fired`",
    "y=';touch fired;\"",
    "z=*",
    "--output=fired",
    "a=\n#SBATCH -p spot",
]
IN_JOB = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node1",
    "SLURMD_NODENAME": "node1",
}  # fmt: skip


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    """A folder of them; `record` beside it holds what they were started with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {name: RECORDS for name in ("srun", "apptainer", "python", "sbatch", "scancel")}
    scripts |= {"squeue": SQUEUE, "scontrol": "#!/bin/sh\necho node1\n", "nvidia-smi": "#!/bin/sh\n"}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(stand_ins: Path, *words: str, script="train.sh", cwd: Path = REPOSITORY, **env: str):
    folder = stand_ins.parent
    ours = {"RECORD": str(folder / "record"), "RUN": str(folder / "run $(touch fired) %j")} | IN_JOB | env
    base = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SBATCH", "PHI3V"))}
    path = f"{stand_ins}{os.pathsep}{base['PATH']}"
    done = subprocess.run(
        ["bash", str(REPOSITORY / "slurm" / script), *words], cwd=cwd, env=base | {"PATH": path} | ours,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert not list(folder.rglob("fired")) and not (cwd / "fired").exists(), "something was executed"
    return done


def recorded(stand_ins: Path) -> list[list[str]]:
    """Each start of a stand-in: its name and its words."""
    path = stand_ins.parent / "record"
    text = path.read_text() if path.exists() else ""
    return [one.split("\0")[:-1] for one in text.split("\n\0")[:-1]]


@pytest.mark.fault(93)
@pytest.mark.parametrize("way", ["venv", "apptainer", "pyxis"])
def test_ranks_start_where_the_software_is_with_the_words_as_they_were_typed(stand_ins, tmp_path, way):
    (tmp_path / "image.sif").touch()
    env = {
        "venv": {"PHI3V_VENV": str(tmp_path)},  # whose bin/ is that of the stand-ins
        "apptainer": {"PHI3V_APPTAINER": str(tmp_path / "image.sif"), "PHI3V_MOUNTS": "/models,/data"},
        "pyxis": {"PHI3V_PYXIS": "/images/a b.sqsh", "PHI3V_MOUNTS": "/models:/models"},
    }[way]
    inside = {
        "apptainer": ["apptainer", "exec", "--cleanenv=false", "--bind", f"{REPOSITORY},/models,/data", "--pwd",
                      str(REPOSITORY), str(tmp_path / "image.sif")],
    }.get(way, [])  # fmt: skip
    container = {
        "pyxis": ["--container-image=/images/a b.sqsh", f"--container-mounts={REPOSITORY}:{REPOSITORY},/models:/models",
                  f"--container-workdir={REPOSITORY}", "--no-container-mount-home"],
    }.get(way, [])  # fmt: skip
    done = start(stand_ins, "c.yaml", *HARM, PHI3V_RANKS_PER_NODE="2", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = recorded(stand_ins)
    (ranks,) = [words for words in starts if words[0] == "srun" and "phi3v_dist.cli.train" in words]
    assert ranks[-len(HARM) - 5 :] == ["python", "-m", "phi3v_dist.cli.train", "--config", "c.yaml", *HARM]
    options = ranks[1 : -len(HARM) - 5]
    assert options[len(options) - len(inside) :] == inside and set(container) <= set(options)
    assert {
        "--ntasks-per-node=2",
        "--ntasks=2",
        "--cpus-per-task=4",
        "--kill-on-bad-exit=1",
        "--nodelist=node1",
    } <= set(options)
    (log,) = [word for word in options if word.startswith("--output=")]
    assert log == f"--output={tmp_path}/run $(touch fired) %%j/logs/%N.log"  # %% is % to Slurm
    asked = [words for words in starts if "phi3v_dist.cli.job" in words]
    assert [words[words.index("phi3v_dist.cli.job") + 1] for words in asked] == ["begin", "nodes", "judge"]
    assert {words[0] for words in asked} == {"venv": {"python"}, "apptainer": {"apptainer"}, "pyxis": {"srun"}}[way]
    assert asked[0][-len(HARM) - 2 :] == ["--config", "c.yaml", *HARM]


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"PHI3V_VENV": "/nowhere"}, 5, "there is no Python at /nowhere/bin/python: run 'make setup'"),
        ({"PHI3V_APPTAINER": "/nowhere.sif"}, 5, "there is no container /nowhere.sif"),
        ({"PHI3V_NODES": "a[$(touch fired)]"}, 2, "PHI3V_NODES is 'a[$(touch fired)]': it must be a number"),
        ({"PHI3V_MAX_REQUEUES": "-1"}, 2, "PHI3V_MAX_REQUEUES is '-1'"),
        ({"PHI3V_EXAMINE_S": "08"}, 2, "PHI3V_EXAMINE_S is '08'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_any_srun(stand_ins, env, code, message):
    done = start(stand_ins, "c.yaml", **env)
    assert done.returncode == code and message in done.stderr and recorded(stand_ins) == []


@pytest.mark.parametrize("script", ["train.sh", "sweep.sh"])
def test_a_job_submitted_elsewhere_says_so(stand_ins, tmp_path, script):
    done = start(stand_ins, "c.yaml", script=script, cwd=tmp_path)
    assert done.returncode == 5 and recorded(stand_ins) == []
    assert f"slurm/{script}: {tmp_path} holds no slurm/job.sh: submit the job in the folder that does" in done.stderr


@pytest.mark.parametrize(
    ("script", "words", "env", "message"),
    [
        ("train.sh", [], {}, "Usage: sbatch [options] slurm/train.sh CONFIG.yaml"),
        ("sweep.sh", ["c.yaml", "sweep.txt"], {}, "a sweep is an array: sbatch --array=0-N"),
        ("sweep.sh", ["c.yaml"], {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "no sweep is named"),
    ],
)  # fmt: skip
def test_a_job_without_its_words_says_which(stand_ins, script, words, env, message):
    done = start(stand_ins, *words, script=script, PHI3V_VENV=str(stand_ins.parent), **env)
    assert done.returncode == 2 and message in done.stderr and recorded(stand_ins) == []


@pytest.mark.fault(93)
def test_a_dry_run_shows_and_asks_what_would_be_submitted(stand_ins, config_file, tmp_path):
    (stand_ins / "python").unlink()  # the real one looks at the settings
    words = ["--nodes", "2", "--job-name", "$(touch fired) `touch fired`", str(config_file), "run.seed=7"]
    done = start(stand_ins, "--dry-run", *words, SLURM_JOB_ID="", PHI3V_VENV=sys.prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  sbatch")]
    submitted = shlex.split(line)
    assert submitted == ["sbatch", *words[:4], "slurm/train.sh", *words[4:]]
    assert "= 2 ranks x" in done.stdout and "seed 7" in done.stdout
    assert recorded(stand_ins) == [["sbatch", "--test-only", *submitted[1:]]]

    done = start(stand_ins, "--nodes=2", str(config_file), "run.sede=7", SLURM_JOB_ID="", PHI3V_VENV=sys.prefix)
    assert done.returncode == 2 and "did you mean `run.seed`?" in done.stderr
    assert len(recorded(stand_ins)) == 1, "Slurm is not asked about wrong settings"
    for wrong, message in ((["--nodes", "2"], "no settings are named"), (["-N", "two", "c.yaml"], "--nodes is 'two'")):
        done = start(stand_ins, "--dry-run", *wrong, SLURM_JOB_ID="", PHI3V_VENV=sys.prefix)
        assert done.returncode == 2 and message in done.stderr


def test_a_dry_run_without_slurm_looks_at_the_settings_all_the_same(stand_ins, config_file):
    for path in stand_ins.iterdir():
        path.unlink()
    for name in ("bash", "env", "sed", "dirname"):
        (stand_ins / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    done = start(stand_ins, "--dry-run", str(config_file), SLURM_JOB_ID="", PHI3V_VENV=sys.prefix, PATH=str(stand_ins))
    assert done.returncode == 0 and "rows of up to" in done.stdout, done.stderr
    assert "there is no sbatch here, so Slurm was not asked" in done.stderr


def test_a_dry_run_of_a_sweep_shows_each_task(stand_ins, config_file):
    (stand_ins / "python").unlink()
    sweep = ["--array", "0-3", str(config_file), "slurm/sweep.example.txt", "train.steps=100"]
    done = start(stand_ins, "--dry-run", *sweep, script="sweep.sh", SLURM_JOB_ID="", PHI3V_VENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    tasks = yaml.safe_load(config_file.read_text())["run"]
    assert re.findall(r"^task (\d): .* → (.*)$", done.stdout, flags=re.M) == [
        (str(n), f"{tasks['root']}/{name}") for n, name in enumerate(["run-0", "run-1", "run-2", "slow-eyes"])
    ]
    assert recorded(stand_ins) == [["sbatch", "--test-only", *sweep[:2], "slurm/sweep.sh", *sweep[2:]]]


def test_a_sweep_asks_slurm_for_what_a_run_asks_for():
    def header(name: str) -> list[str]:
        return re.findall(r"^#SBATCH (?!--output)(.*)$", (REPOSITORY / "slurm" / name).read_text(), flags=re.M)

    assert header("sweep.sh") == header("train.sh") != []


def test_the_container_takes_files_that_are_there_and_the_flash_attention_of_the_page():
    text = (REPOSITORY / "slurm/phi3v.def").read_text()
    copied = re.findall(r"^    (\S+) /source/", text, flags=re.M)
    assert copied and all((REPOSITORY / name).exists() for name in copied)
    (version,) = re.findall(r"FLASH_ATTN=([\d.a-z]+)$", text, flags=re.M)
    (cuda,) = re.findall(r"CUDA=([\d.]+)$", text, flags=re.M)
    page = (REPOSITORY / "docs/gpu-setup.md").read_text()
    assert f"flash-attn=={version}" in page and f"nvidia/cuda:{cuda}-devel" in page
    assert f"FLASH_ATTN:={version}" in (REPOSITORY / "slurm/container.sh").read_text()
