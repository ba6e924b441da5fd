#!/usr/bin/env bash
#SBATCH --job-name=phi3v
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Train on the nodes of a job, through notices, crashes and dead nodes, until the run is finished:
#
#   sbatch --nodes 8 slurm/train.sh launch/configs/quickstart.yaml train.steps=1000
#   slurm/train.sh --dry-run --nodes 8 launch/configs/quickstart.yaml train.steps=1000
#
# Whole nodes are asked for, with all their GPUs, cores and memory. Two minutes before the time limit the job saves, is
# queued again and goes on. Settings are given as arguments and stay arguments: no shell reads a word of them. What the
# environment of sbatch may say (PHI3V_…) is in job.sh and README.md beside this file. Submit it in the folder that holds
# slurm/: the repository, or where phi3v-init has copied these scripts.
set -eEuo pipefail
trap 'echo "slurm/train.sh: $BASH_COMMAND (line $LINENO of ${BASH_SOURCE[0]}) failed with $?" >&2' ERR

[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "${BASH_SOURCE[0]}")/.." # in a job, Slurm runs a copy from elsewhere
if [[ ! -f slurm/job.sh ]]; then
  echo "slurm/train.sh: $PWD holds no slurm/job.sh: submit the job in the folder that does, or with sbatch --chdir" >&2
  exit 5
fi
source slurm/cluster.sh
source slurm/job.sh
[[ ${BASH_SOURCE[0]} != "$0" ]] || unset sweep # which slurm/sweep.sh sets
if [[ -z ${SLURM_JOB_ID:-} || ${1:-} == --dry-run ]]; then
  source slurm/dry_run.sh
fi
(($#)) || give_up 2 "no settings are named. Usage: sbatch [options] slurm/train.sh CONFIG.yaml [key=value…]"
check_environment

trap 'notice USR1' USR1
trap 'notice TERM' TERM
source slurm/env.sh
make_mounts
settings=(--config "$@")
[[ -z ${sweep:-} ]] || settings_of_task "$@"
[[ -z $PHI3V_STAGE ]] || settings+=("data.cache.path=$PHI3V_STAGE" data.cache.local_shards=true)
may_begin "${settings[@]}"
while true; do
  choose_nodes "${settings[@]}"
  stage "${settings[@]}"
  tell_ranks
  on_nodes train "$use" "$ranks_per_node" --cpus-per-task="$(cpus_per_rank)" --kill-on-bad-exit=1 --wait=60 -- \
    python -m phi3v_dist.cli.train "${settings[@]}" &
  watch_over $!
  judge --exit-code "$status" ${noticed:+--noticed}
done
