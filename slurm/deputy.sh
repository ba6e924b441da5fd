#!/usr/bin/env bash
# On another node than the batch script's: queue the job again when that node is gone. A job submitted with --no-kill
# outlives it, and nobody would be left to go on; without --no-kill Slurm does the same, later.
#
#   slurm/deputy.sh COUNTER JOB       COUNTER: a file that the batch script renews every few seconds
set -euo pipefail
readonly LOOK_S=5 SILENT_S=180
counter=$1 job=$2 last="" silent_s=0

while sleep "$LOOK_S"; do
  now=$(cat "$counter") || continue # a shared disk may be away for a while
  if [[ $now == "$last" ]]; then ((silent_s += LOOK_S)); else silent_s=0 last=$now; fi
  ((silent_s < SILENT_S)) && continue
  echo "the batch script of job $job has been silent for $silent_s s: its node is gone, the job is queued again"
  scontrol requeue "$job"
  exit
done
