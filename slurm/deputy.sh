#!/usr/bin/env bash
# On another node than the batch script's: queue the job again when that node is gone. A job submitted with --no-kill
# outlives it, and nobody would be left to go on; without --no-kill Slurm does the same, later.
#
#   slurm/deputy.sh COUNTER JOB       COUNTER: a file that the batch script renews, and removes when it needs no deputy
set -euo pipefail
readonly LOOKS=180 # a second each; looks are counted and not time, since a disk that is away stops both of us
counter=$1 job=$2 last="" unchanged=0

while [[ -e $counter ]]; do
  sleep 1
  now=$(cat "$counter" 2>/dev/null) || continue
  if [[ $now == "$last" ]]; then ((unchanged += 1)); else last=$now unchanged=0; fi
  ((unchanged > LOOKS)) || continue
  why="the batch script of job $job has shown no life for $LOOKS s: its node is gone, the job is queued again"
  echo "$why"
  echo "$why" >"$counter" # for the log of the next life
  until message=$(scontrol requeue "$job" 2>&1); do
    echo "$message"
    [[ $message =~ contact|imed\ out|onnect|ocket ]] || exit 1
    sleep 10
  done
  exit
done
