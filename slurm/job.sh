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
readonly AWAY_S=600            # Slurm's controller may be away so long
readonly LOOK_S=2              # between looks at files
readonly LATE_S=40             # a node that examines itself so much longer than half of them do is left out, too
readonly OVER_S=20             # srun may live so much longer than its ranks: it waits for nodes that are gone
readonly LEAVE_S=5             # and the deputy may take so long to leave
readonly SILENT_S=120          # and so long may rank 0's node show no life
start=0 noticed="" step_pid="" status=0
job=${SLURM_JOB_ID:-}
# A task of an array: one of them has the number of the whole array, by which Slurm's programs mean all tasks
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { printf '%(%H:%M:%S)T %s%s\n' -1 "${job:+[job $job] }" "$*"; }

give_up() { # give_up CODE REASON
  say "$2" >&2
  exit "$1"
}

check_numbers() { # before any arithmetic, which in bash would run what is inside $(…)
  local name
  for name in PHI3V_{NODES,MIN_NODES,RANKS_PER_NODE,MAX_REQUEUES,EXAMINE_S,STAGE_S}; do
    [[ -z ${!name} || ${!name} =~ ^(0|[1-9][0-9]{0,6})$ ]] || give_up 2 "$name is '${!name}': it must be a number"
  done
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
  answer=()
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
    --output="${run//%/%%}/logs/%N.log" --open-mode=append --unbuffered "${container[@]}" "${options[@]}" "${inside[@]}" "$@"
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
  for step in $(squeue --noheader --steps --jobs "$job" --format %i 2>/dev/null); do
    [[ ! $step =~ \.[0-9]+$ ]] || scancel --signal=KILL "$step" 2>/dev/null || true
  done
  [[ -z $1 ]] || kill -KILL "$1" 2>/dev/null || true
}

seconds_left() { # until Slurm ends the job, as its controller counts; nothing when there is no limit
  local text days=0 parts
  text=$(squeue --noheader --jobs "$job" --format %L 2>/dev/null) || return 0
  [[ $text =~ ^([0-9]+-)?([0-9]+:){0,2}[0-9]+$ ]] || return 0
  [[ $text != *-* ]] || days=${text%%-*}
  IFS=: read -ra parts <<<"0:0:${text#*-}"
  echo $((((10#$days * 24 + 10#${parts[-3]}) * 60 + 10#${parts[-2]}) * 60 + 10#${parts[-1]}))
}

settings_of_task() { # settings_of_task CONFIG FILE [key=value…]: with what the task's line in the sweep's file adds
  local words
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || give_up 2 "a sweep is an array: sbatch --array=0-N slurm/sweep.sh CONFIG.yaml FILE"
  (($# >= 2)) || give_up 2 "no sweep is named. Usage: sbatch --array=0-N slurm/sweep.sh CONFIG.yaml FILE [key=value…]"
  settings=(--config "$1" "${@:3}")
  words=$(here python launch/job.py sweep --file "$2" --task "$SLURM_ARRAY_TASK_ID" "${settings[@]}") || exit $?
  mapfile -t words <<<"$words"
  say "task $SLURM_ARRAY_TASK_ID: ${words[*]}"
  settings+=("${words[@]}")
}

may_begin() { # may_begin SETTINGS…: wrong ones end the job here, and so does a finished run
  local gpus
  ask begin "$@"
  run=${answer[run]}
  [[ ${answer[finished]} == no ]] || give_up 0 "$run is finished: nothing to do"
  umask 077 # a run folder is for its owner alone
  mkdir -p "$run/logs" "$run/attempts"
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
  ranks_per_node=${PHI3V_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $run"
}

ask_slurm() { # what it knows of the job, in the variable `fields`; a controller may be away for a while
  local waited_s=0
  until fields=$(scontrol show job "$job" 2>/dev/null); do
    ((waited_s++ < AWAY_S)) || give_up 1 "Slurm does not answer: its controller is away, or this node is cut off"
    sleep 1 &
    wait $! || true
  done
  (($(sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' <<<"$fields") <= ${SLURM_RESTART_COUNT:-0})) || [[ $fields != *JobState=RUNNING* ]] ||
    give_up 0 "the job runs elsewhere by now: this is what was left of its restart ${SLURM_RESTART_COUNT:-0}"
}

cpus_per_rank() { # the cores of this node, divided among its ranks
  echo $((SLURM_CPUS_ON_NODE > ranks_per_node ? SLURM_CPUS_ON_NODE / ranks_per_node : 1))
}

choose_nodes() { # choose_nodes SETTINGS…: nodes examine themselves; those that are fit, and ended no starts, are used
  local fields hosts wanted least
  life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$((++start))
  ask_slurm
  hosts=$(scontrol show hostnames "$(sed -n 's/^ *NodeList=//p' <<<"$fields")" | paste -sd,)
  wanted=${PHI3V_NODES:-$SLURM_JOB_NUM_NODES} least=${PHI3V_MIN_NODES:-${PHI3V_NODES:-$SLURM_JOB_NUM_NODES}}
  on_nodes "$hosts" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 -- \
    python launch/doctor.py --report "$run/preflight" --token "$life" "$@" &
  wait_for_reports $! "$(tr , '\n' <<<"$hosts" | wc -l)"
  ask nodes "$run" --life "$life" --hosts "$hosts" --wanted "$wanted" --least "$least" \
    --time-left "$(seconds_left)" ${noticed:+--noticed}
  case ${answer[action]} in
  train) use=${answer[use]} ;;
  requeue) come_back "${answer[bad]:-}" ;;
  *) exit "${answer[code]}" ;;
  esac
}

wait_for_reports() { # wait_for_reports PID NUM_NODES: until all have reported, or half of them have and the rest is late
  local waited_s=0 late_s=0 told
  while kill -0 "$1" 2>/dev/null; do
    sleep "$LOOK_S" &
    wait $! || true
    told=$({ grep -ls "\"token\": \"$life\"" "$run"/preflight/*.json || true; } | wc -l)
    ((waited_s += LOOK_S)) || true
    ((2 * told < $2)) || ((late_s += LOOK_S))
    ((waited_s < PHI3V_EXAMINE_S && late_s < LATE_S)) || end_steps "$1"
  done
  wait_for "$1"
}

stage() { # stage SETTINGS…: each node copies the shards to its own disk, if asked to; what is not copied is read where it is
  local timer
  [[ -n $PHI3V_STAGE ]] || return 0
  say "each node copies the shards to $PHI3V_STAGE"
  on_nodes "$use" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 -- \
    python launch/prepare.py stage "$@" &
  step_pid=$!
  { sleep "$PHI3V_STAGE_S" && end_steps "$step_pid"; } &
  timer=$!
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  wait_for "$step_pid"
  kill "$timer" 2>/dev/null || true
  step_pid=""
  [[ -z $noticed ]] || come_back ""
  ((status == 0)) || say "not every node could copy the shards (see $run/logs): they are read where they are"
}

tell_ranks() {                                                                 # which start this is, and how long the job has
  export PHI3V_START=$start PHI3V_LAST_WORD=$run/attempts/last-word-$life.json # another job may be refused in this run
  export PHI3V_TIME_LEFT_S
  PHI3V_TIME_LEFT_S=$(seconds_left)
  [[ -n $PHI3V_TIME_LEFT_S ]] || unset PHI3V_TIME_LEFT_S
}

watch_over() { # watch_over PID: until the ranks have ended, or srun only waits for a node that is gone
  local counter=$run/logs/alive-$SLURM_JOB_ID log deputy="" ended before attempt beat="" last_beat="" over_s=0 silent_s=0
  step_pid=$1 before=$(newest_attempt)
  tail --lines=0 --follow=name --retry "$run/logs/${use%%,*}.log" 2>/dev/null &
  log=$!
  echo "$SECONDS" >"$counter"
  if [[ $use == *,* ]]; then # a node that outlives this one
    (container=() && inside=() && on_nodes "${use##*,}" --ntasks=1 -- slurm/deputy.sh "$counter" "$job") &
    deputy=$!
  fi
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  while kill -0 "$step_pid" 2>/dev/null; do
    echo "$SECONDS" >"$counter" || true # a full disk: the ranks say so
    sleep "$LOOK_S" &
    wait $! || true
    attempt=$(newest_attempt)
    [[ $attempt != "$before" ]] || continue
    ! grep -qs '"verdict": {' "$attempt"/node-*.json || ((over_s += LOOK_S))
    beat=$(cat "$attempt/alive" 2>/dev/null) || true
    if [[ $beat == "$last_beat" ]]; then ((silent_s += LOOK_S)); else silent_s=0 last_beat=$beat; fi
    if ((over_s > OVER_S || silent_s > SILENT_S)); then
      say "the ranks have ended and srun has not: it is ended, and a node is probably gone"
      end_steps "$step_pid"
    fi
  done
  wait_for "$step_pid"
  ended=$status step_pid=""
  sleep 1 # for the last lines of the log
  kill "$log" 2>/dev/null || true
  rm -f "$counter"
  [[ -z $deputy ]] || let_go "$deputy"
  status=$ended
}

let_go() { # let_go PID: it leaves by itself, unless its node is gone
  local waited_s=0
  while kill -0 "$1" 2>/dev/null && ((waited_s++ < LEAVE_S)); do
    sleep 1 &
    wait $! || true
  done
  kill -KILL "$1" 2>/dev/null || true
  wait_for "$1"
}

newest_attempt() { # folder of the run's newest attempt; nothing before the first
  local folders=("$run"/attempts/[0-9]*)
  [[ ! -d ${folders[-1]} ]] || echo "${folders[-1]}"
}

judge() { # returns when another start in place may help
  ask judge "$run" --life "$life" --exit-code "$status" ${noticed:+--noticed}
  rm -f "$PHI3V_LAST_WORD"
  case ${answer[action]} in
  done) exit 0 ;;
  requeue) come_back "" ;;
  again) say "starting again on the nodes that are left" ;;
  *) exit "${answer[code]}" ;;
  esac
}

come_back() { # come_back NODES: queue the job again, without these nodes; ends here
  local excluded fields state
  trap '' TERM USR1 # requeueing ends this script
  ((${SLURM_RESTART_COUNT:-0} < PHI3V_MAX_REQUEUES)) ||
    give_up 8 "the job has come back ${SLURM_RESTART_COUNT} times (PHI3V_MAX_REQUEUES): submit it again to go on"
  ask_slurm
  state=$(sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' <<<"$fields")
  case $state in
  RUNNING)
    scontrol requeue "$job" ||
      give_up 1 "the job cannot be queued again: to go on, submit it again with the same words"
    say "queued again${1:+, without $1}"
    ;;
  PENDING | REQUEUED) say "Slurm has queued the job again${1:+; it is to come back without $1}" ;;
  *) give_up 0 "the job is $state: it does not come back" ;;
  esac
  if [[ -n $1 ]]; then
    excluded=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $excluded != "(null)" ]] || excluded=""
    scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$1" ||
      say "the nodes could not be excluded: scontrol update JobId=$job ExcNodeList=$1"
  fi
  exit 0
}

dry_run() { # what would be submitted, and what the settings and Slurm say to it; ends here
  local script=slurm/train.sh options=() nodes=1 ranks file=()
  [[ -z ${sweep:-} ]] || script=slurm/sweep.sh
  [[ ${1:-} != --dry-run ]] || shift
  while (($#)) && [[ $1 != *.yaml && $1 != *.yml ]]; do
    case $1 in
    --nodes | -N) nodes=${2:-} ;;
    --nodes=*) nodes=${1#*=} ;;
    -N*) nodes=${1#-N} ;;
    esac
    options+=("$1")
    shift
  done
  (($#)) || give_up 2 "no settings are named. Usage: $script --dry-run [options] CONFIG.yaml ${sweep:+FILE }[key=value…]"
  [[ -z ${sweep:-} || $# -ge 2 ]] || give_up 2 "no sweep is named after $1: a text file with a line for each task"
  nodes=${nodes##*-} ranks=${PHI3V_RANKS_PER_NODE:-1} # of MIN-MAX nodes the most
  [[ $nodes =~ ^[1-9][0-9]{0,6}$ ]] || give_up 2 "--nodes is '$nodes': it must be a number"
  check_numbers
  source slurm/env.sh

  echo "Would be submitted, from $PWD:"
  printf '  sbatch'
  printf ' %q' "${options[@]}" "$script" "$@"
  printf '\n\nOptions in its header, for those not given there:\n'
  sed -n 's/^#SBATCH /  /p' "$script"
  [[ -z ${sweep:-} ]] || file=("$2")
  set -- "$1" "${@:2+${#file[@]}}"
  printf '\nWould run, on %s node(s):\n  srun --ntasks-per-node=%s' "$nodes" "${PHI3V_RANKS_PER_NODE:-GPUS_OF_A_NODE}"
  printf ' %q' "${container[@]}" "${inside[@]}" python launch/train.py --config "$@"
  printf '\n\n'
  if ((${#container[@]})); then
    echo "The settings were not looked at: what could do so is in $PHI3V_PYXIS"
  elif [[ -n ${sweep:-} ]]; then
    echo "What the tasks add, and their runs:"
    "${inside[@]}" python launch/job.py sweep --file "${file[0]}" --config "$@" || exit $?
  else
    echo "The settings say, for $((nodes * ranks)) rank(s), $ranks on each node (PHI3V_RANKS_PER_NODE=… says another number):"
    "${inside[@]}" python launch/check.py --world_size "$((nodes * ranks))" --config "$@" || exit $?
  fi
  command -v sbatch >/dev/null || give_up 0 "there is no sbatch here, so Slurm was not asked"
  printf '\nSlurm says:\n'
  sbatch --test-only "${options[@]}" "$script" "$1" "${file[@]}" "${@:2}" 2>&1
  exit
}
