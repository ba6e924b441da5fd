#!/usr/bin/env bash
#SBATCH --job-name=phi3v
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
#
# Train once for each line of a text file, as tasks of an array that come back, log and end each by itself:
#
#   sbatch --array=0-3%2 slurm/sweep.sh launch/configs/quickstart.yaml slurm/sweep.example.txt train.steps=100
#   slurm/sweep.sh --dry-run --array=0-3%2 launch/configs/quickstart.yaml slurm/sweep.example.txt train.steps=100
#
# Everything else is as in train.sh, whose header this is but for the name of the log.
set -euo pipefail

# shellcheck disable=SC2034  # train.sh reads it
sweep=yes
[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -f slurm/train.sh ]]; then
  echo "slurm/sweep.sh: $PWD holds no slurm/job.sh: submit the job in the folder that does, or with sbatch --chdir" >&2
  exit 5
fi
source slurm/train.sh
