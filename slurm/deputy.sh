#!/usr/bin/env bash
# On another node than the batch script's: queue the job again when that node is gone. A job submitted with --no-kill
# outlives it, and nobody would be left to go on; without --no-kill Slurm does the same, later.
#
#   slurm/deputy.sh COUNTER JOB       COUNTER: a file that the batch script renews, and removes when it needs no deputy
set -euo pipefail
readonly SILENT_S=180
counter=$1 job=$2 last="" since=$SECONDS

while [[ -e $counter ]]; do
  sleep 1
  now=$(cat "$counter" 2>/dev/null) || continue
  [[ $now == "$last" ]] || last=$now since=$SECONDS
  if ((SECONDS - since > SILENT_S)); then
    echo "the batch script of job $job has shown no life for $SILENT_S s: its node is gone, the job is queued again"
    scontrol requeue "$job"
    exit
  fi
done
