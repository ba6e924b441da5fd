"""The Slurm scripts that `phi3v-init` copies train with the installed wheel, where there is no repository."""

import json

import pytest
from installed import Installation

from slurm.jobs import Job

SHORT = (
    "run.name=installed", "train.steps=3", "train.warmup_steps=1", "eval.every_steps=3", "eval.samples=2",
    "eval.base=false", "eval.blind=false", "eval.max_new_tokens=4", "checkpoint.every_steps=3",
)  # fmt: skip


@pytest.mark.supports("srun", on="Slurm")
def test_copied_scripts_train_on_two_nodes(slurm, tmp_path):
    installation = Installation.build(tmp_path / "installation")
    user = tmp_path / "user"
    user.mkdir()
    installation.run(user, "phi3v-init", "quickstart")
    installation.run(user, "phi3v-prepare", "sample", "--out", "data/catalogue", "num_products=24")
    installation.run(user, "phi3v-prepare", "tiny", "--out", "data/tiny-phi3v")

    # The environment of a login node on which nobody has heard of the repository
    environment = {"PYTHONPATH": "", "PHI3V_VENV": str(installation.venv)}
    recipe = "configs/quickstart.yaml"
    job_id = slurm.sbatch("--nodes=2", "slurm/train.sh", recipe, *SHORT, cwd=user, env=environment)
    Job(slurm, job_id, user / "runs/installed").until_finished()

    summary = json.loads((user / "runs/installed/summary.json").read_text())
    owner = json.loads((user / "runs/installed/attempts/0001/owner.json").read_text())
    assert summary["train/step"] == 3 and owner["hosts"] == ["node1", "node2"]
    assert installation.opened() == [], "files of the repository were read"
