# shellcheck shell=bash
# What slurm/train.sh does, step by step. Bash starts and ends things, since Slurm's programs are not to be had inside
# containers; launch/job.py, inside, says what to do. Its answers are lines of name=value.

: "${PHI3V_NODES:=}"           # nodes to train on; those beyond are spares; default: all of the job
: "${PHI3V_MIN_NODES:=}"       # train on as few as this rather than wait for others; default: PHI3V_NODES
: "${PHI3V_RANKS_PER_NODE:=}"  # default: --ntasks-per-node, else a rank for each GPU, else one
: "${PHI3V_MAX_REQUEUES:=100}" # how often the job may come back
: "${PHI3V_EXAMINE_S:=120}"    # a node that has not examined itself by then is left out
: "${PHI3V_STAGE:=}"           # folder on each node's own disk, to which the shards are copied before training
: "${PHI3V_STAGE_S:=3600}"     # training begins by then, with what is copied
readonly OVER_S=20             # srun may live so much longer than its ranks: it waits for nodes that are gone
readonly SILENT_S=120          # and so long may rank 0's node show no life
start=0 noticed="" step_pid="" status=0

say() { printf '%(%H:%M:%S)T [job %s] %s\n' -1 "${SLURM_JOB_ID:-}" "$*"; }

give_up() { # give_up CODE REASON
  say "$2" >&2
  exit "$1"
}

here() { # here COMMAND…: on this node, where the software is; not to be ended by a notice
  trap '' TERM USR1
  if ((${#container[@]})); then
    exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${container[@]}" "$@"
  fi
  exec "${inside[@]}" "$@"
}

ask() { # ask VERB WORDS…: launch/job.py's answer, in the array `answer`
  local lines line
  lines=$(here python launch/job.py "$@") || exit $?
  while IFS= read -r line; do answer[${line%%=*}]=${line#*=}; done <<<"$lines"
}
declare -A answer

on_nodes() { # on_nodes NODES OPTIONS… -- COMMAND…: a step on these nodes, where the software is
  local nodes=$1 options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  trap '' TERM # Slurm sends it to this whole script, and srun would end the ranks
  exec srun --overlap --mem=0 --nodelist="$nodes" --nodes="$(tr , '\n' <<<"$nodes" | wc -l)" \
    --output="$run/logs/%N.log" --open-mode=append --unbuffered "${container[@]}" "${options[@]}" "${inside[@]}" "$@"
}

notice() { # the job is going to be ended: the ranks save after the step in hand, and stop
  noticed=$1
  say "$1: the ranks are asked to save and to stop"
  [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2>/dev/null || true # srun passes it on
}

wait_for() { # wait_for PID: until it has ended, whatever signals come; its exit status is in `status`
  status=0
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1" || status=$?
}

end_steps() { # of this job, also those that wait for a node that is gone
  local step
  for step in $(squeue --noheader --steps --jobs "$SLURM_JOB_ID" --format %i 2>/dev/null); do
    [[ ! $step =~ \.[0-9]+$ ]] || scancel --signal=KILL "$step" 2>/dev/null || true
  done
  [[ -z $1 ]] || kill -KILL "$1" 2>/dev/null || true
}

seconds_left() { # until Slurm ends the job, as its controller counts; nothing when there is no limit
  local text days=0 parts
  text=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %L 2>/dev/null) || return 0
  [[ $text =~ ^([0-9]+-)?([0-9]+:){0,2}[0-9]+$ ]] || return 0
  [[ $text != *-* ]] || days=${text%%-*}
  IFS=: read -ra parts <<<"0:0:${text#*-}"
  echo $((((10#$days * 24 + 10#${parts[-3]}) * 60 + 10#${parts[-2]}) * 60 + 10#${parts[-1]}))
}

may_begin() { # wrong settings end the job here, and so does a finished run
  local gpus
  [[ -z $PHI3V_STAGE ]] || settings+=("data.cache.path=$PHI3V_STAGE" data.cache.local_shards=true)
  ask begin "${settings[@]}"
  run=${answer[run]}
  [[ ${answer[finished]} == no ]] || give_up 0 "$run is finished: nothing to do"
  mkdir -p "$run/logs" "$run/attempts"
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
  ranks_per_node=${PHI3V_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}
  cpus_per_rank=$((SLURM_CPUS_ON_NODE > ranks_per_node ? SLURM_CPUS_ON_NODE / ranks_per_node : 1))
  export PHI3V_LAST_WORD=$run/attempts/last-word.json
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $run"
}

choose_nodes() { # each node examines itself; those that are fit, and did not end earlier starts, are used
  local hosts wanted least doctor timer
  life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$((++start))
  hosts=$(scontrol show hostnames "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %N)" | paste -sd,)
  wanted=${PHI3V_NODES:-$SLURM_JOB_NUM_NODES} least=${PHI3V_MIN_NODES:-${PHI3V_NODES:-$SLURM_JOB_NUM_NODES}}
  on_nodes "$hosts" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 -- \
    python launch/doctor.py --report "$run/preflight" --token "$life" "${settings[@]}" &
  doctor=$!
  { sleep "$PHI3V_EXAMINE_S" && end_steps "$doctor"; } &
  timer=$!
  wait_for "$doctor"
  kill "$timer" 2>/dev/null || true
  [[ -z $noticed ]] || come_back ""
  ask nodes "$run" --life "$life" --hosts "$hosts" --wanted "$wanted" --least "$least" --time-left "$(seconds_left)"
  case ${answer[action]} in
    train) use=${answer[use]} ;;
    requeue) come_back "${answer[bad]}" ;;
    *) exit "${answer[code]}" ;;
  esac
  export PHI3V_START=$start PHI3V_TIME_LEFT_S
  PHI3V_TIME_LEFT_S=$(seconds_left)
  rm -f "$PHI3V_LAST_WORD"
}

stage() { # each node copies the shards to its own disk, if asked to; what is not copied is read where it is
  local timer
  [[ -n $PHI3V_STAGE ]] || return 0
  say "each node copies the shards to $PHI3V_STAGE"
  on_nodes "$use" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 -- \
    python launch/prepare.py stage "${settings[@]}" &
  step_pid=$!
  { sleep "$PHI3V_STAGE_S" && end_steps "$step_pid"; } &
  timer=$!
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  wait_for "$step_pid"
  kill "$timer" 2>/dev/null || true
  step_pid=""
  [[ -z $noticed ]] || come_back ""
  ((status == 0)) || say "not every node could copy the shards (see $run/logs): they are read where they are"
  PHI3V_TIME_LEFT_S=$(seconds_left)
}

watch_over() { # watch_over PID: until the ranks have ended, or srun only waits for a node that is gone
  local log before attempt beat="" last_beat="" over_s=0 silent_s=0
  step_pid=$1 before=$(newest_attempt)
  tail --lines=0 --follow=name --retry "$run/logs/${use%%,*}.log" 2>/dev/null &
  log=$!
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  while kill -0 "$step_pid" 2>/dev/null; do
    sleep 1 &
    wait $! || true
    attempt=$(newest_attempt)
    [[ $attempt != "$before" ]] || continue
    ! grep -qs '"verdict": {' "$attempt"/node-*.json || ((++over_s))
    beat=$(cat "$attempt/alive" 2>/dev/null) || true
    [[ $beat == "$last_beat" ]] && ((++silent_s)) || silent_s=0
    last_beat=$beat
    if ((over_s > OVER_S || silent_s > SILENT_S)); then
      say "the ranks have ended and srun has not: it is ended, and a node is probably gone"
      end_steps "$step_pid"
    fi
  done
  wait_for "$step_pid"
  step_pid=""
  sleep 1 # for the last lines of the log
  kill "$log" 2>/dev/null || true
}

newest_attempt() { # folder of the run's newest attempt; nothing before the first
  local folders=("$run"/attempts/[0-9]*)
  [[ ! -d ${folders[-1]} ]] || echo "${folders[-1]}"
}

judge() { # returns when another start in place may help
  ask judge "$run" --life "$life" --exit-code "$status" ${noticed:+--noticed}
  case ${answer[action]} in
    done) exit 0 ;;
    requeue) come_back "" ;;
    again) say "starting again on the nodes that are left" ;;
    *) exit "${answer[code]}" ;;
  esac
}

come_back() { # come_back NODES: queue the job again, without these nodes; ends here
  local excluded state
  trap '' TERM USR1 # requeueing ends this script
  ((${SLURM_RESTART_COUNT:-0} < PHI3V_MAX_REQUEUES)) ||
    give_up 8 "the job has come back ${SLURM_RESTART_COUNT} times (PHI3V_MAX_REQUEUES): submit it again to go on"
  state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
  case $state in
    RUNNING)
      scontrol requeue "$SLURM_JOB_ID" ||
        give_up 1 "the job cannot be queued again: to go on, submit it again with the same words"
      say "queued again${1:+, without $1}"
      ;;
    PENDING | REQUEUED) say "Slurm has queued the job again${1:+; it is to come back without $1}" ;;
    *) give_up 0 "the job is $state: it does not come back" ;;
  esac
  if [[ -n $1 ]]; then
    excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $excluded != "(null)" ]] || excluded=""
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$1" ||
      say "the nodes could not be excluded: scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$1"
  fi
  exit 0
}

dry_run() { # what would be submitted, and what Slurm and the settings say to it; ends here
  local options=() command
  [[ ${1:-} != --dry-run ]] || shift
  while (($#)) && [[ $1 != *.yaml ]]; do
    options+=("$1")
    shift
  done
  (($#)) || give_up 2 "no settings are named. Usage: slurm/train.sh --dry-run [options of sbatch] CONFIG.yaml [key=value…]"
  container=() inside=()
  source slurm/env.sh
  echo "would be submitted:"
  printf '  sbatch'
  printf ' %q' "${options[@]}" slurm/train.sh "$@"
  printf '\nwith these options, unless given:\n'
  sed -n 's/^#SBATCH /  /p' slurm/train.sh
  echo "on its nodes:"
  printf '  srun --nodes=… --ntasks-per-node=%s' "${PHI3V_RANKS_PER_NODE:-…}"
  printf ' %q' "${container[@]}" "${inside[@]}" python launch/train.py --config "$@"
  printf '\nwhat the settings say:\n'
  "${inside[@]}" python launch/check.py --config "$@" || exit $?
  command -v sbatch >/dev/null || give_up 0 "there is no sbatch here, so Slurm was not asked"
  echo "what Slurm says:"
  sbatch --test-only "${options[@]}" slurm/train.sh "$@"
  exit
}
