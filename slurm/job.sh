# shellcheck shell=bash disable=SC2034,SC2154 # its variables are also those of cluster.sh, env.sh and train.sh
# What slurm/train.sh does, step by step. Bash starts and ends things, since Slurm's programs are not to be had inside
# containers; phi3v_dist.cli.job, inside, says what to do. Its answers are lines of name=value.

: "${PHI3V_NODES:=}"           # nodes to train on; those beyond are spares; default: all of the job
: "${PHI3V_MIN_NODES:=}"       # train on as few as this rather than wait for others; default: PHI3V_NODES
: "${PHI3V_RANKS_PER_NODE:=}"  # default: --ntasks-per-node, else a rank for each GPU, else one
: "${PHI3V_MAX_REQUEUES:=100}" # how often the job may come back
: "${PHI3V_EXAMINE_S:=240}"    # a node that has not examined itself by then is left out
: "${PHI3V_STAGE:=}"           # folder on each node's own disk, to which the shards are copied before training
: "${PHI3V_STAGE_S:=3600}"     # training begins by then, with what is copied
readonly LOOK_S=1              # between looks at files
readonly LATE_S=15             # a node that is so much later than half of them, which have waited for it, is left out
readonly AGAIN_S=60            # before nodes are examined again after something that was wrong with all of them
readonly OVER_S=5              # srun may live so much longer than its ranks: it waits for nodes that are gone
readonly SILENT_S=600          # and so long may rank 0's node show no life: the watchers on other nodes are faster
readonly MARGIN_S=30           # from our asking how much time is left to the ranks' hearing it
readonly SHORT_S=600           # with less time left the ranks go by Slurm's notice alone: their grace might be all of it
readonly LAST_S=15             # what is not saved by now will not be: the job is queued again before Slurm ends it
start=0 noticed="" step_pid="" status=0 counter="" deputy=""
job=${SLURM_JOB_ID:-}
# A task of an array: one of them has the number of the whole array, by which Slurm's programs mean all tasks
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
life=$job

check_environment() { # before any arithmetic, which in bash would run what is inside $(…)
  local name
  for name in PHI3V_{MAX_REQUEUES,EXAMINE_S,STAGE_S}; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,6})$ ]] || give_up 2 "$name is '${!name}': it must be a number"
  done
  for name in PHI3V_{NODES,MIN_NODES,RANKS_PER_NODE}; do
    [[ -z ${!name} || ${!name} =~ ^[1-9][0-9]{0,6}$ ]] || give_up 2 "$name is '${!name}': it must be a number from 1 on"
  done
  [[ -z $PHI3V_STAGE || $PHI3V_STAGE =~ ^/[^,:]*$ ]] || give_up 2 "PHI3V_STAGE is '$PHI3V_STAGE': it must be a whole path"
}

check_size() { # a job that is too small would come back again and again
  local least=${PHI3V_MIN_NODES:-${PHI3V_NODES:-1}}
  ((least <= SLURM_JOB_NUM_NODES)) ||
    give_up 2 "the job has $SLURM_JOB_NUM_NODES nodes, and is to train on $least at least: sbatch --nodes $least"
}

make_mounts() { # what a container is to see of a node's own disk must be there before it starts
  [[ -n $PHI3V_STAGE && -n ${container[*]}${inside[*]} ]] || return 0
  mkdir -p -- "$PHI3V_STAGE" || give_up 5 "$PHI3V_STAGE cannot be made on $SLURMD_NODENAME"
  [[ $SLURM_JOB_NUM_NODES == 1 ]] ||
    timeout 60 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" mkdir -p -- "$PHI3V_STAGE" ||
    warn "$PHI3V_STAGE could not be made on every node: those that lack it will fail their examination"
}

settings_of_task() { # settings_of_task CONFIG FILE [key=value…]: with what the task's line in the sweep's file adds
  local words
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || give_up 2 "a sweep is an array: sbatch --array=0-N slurm/sweep.sh CONFIG.yaml FILE"
  (($# >= 2)) || give_up 2 "no sweep is named. Usage: sbatch --array=0-N slurm/sweep.sh CONFIG.yaml FILE [key=value…]"
  settings=(--config "$1" "${@:3}")
  words=$(here python -m phi3v_dist.cli.job sweep --file "$2" --task "$SLURM_ARRAY_TASK_ID" "${settings[@]}") || exit $?
  mapfile -t words < <(sed -n 's/^word=//p' <<<"$words")
  say "task $SLURM_ARRAY_TASK_ID: ${words[*]}"
  settings+=("${words[@]}")
}

may_begin() { # may_begin SETTINGS…: wrong ones end the job here, and so does a finished run
  ask begin --restarts "${SLURM_RESTART_COUNT:-0}" --most "$PHI3V_MAX_REQUEUES" "$@"
  run=${answer[run]}
  case ${answer[action]} in
  begin) ;;
  done) give_up 0 "$run is finished: nothing to do" ;;
  *) exit "${answer[code]}" ;;
  esac
  check_size
  umask 077 # a run folder is for its owner alone
  mkdir -p "$run/logs" "$run/attempts"
  counter=$run/logs/alive-$SLURM_JOB_ID
  [[ ! -s $counter || $(<"$counter") =~ ^[0-9]+$ ]] || warn "$(<"$counter")" # the deputy's word to this life
  trap dismiss_deputy EXIT
  count_ranks
  say "restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $run"
}

count_ranks() { # on each node: as asked for, else one for each GPU, of which Slurm may know more than the driver
  local gpus=0 failed=0 listed node
  if command -v nvidia-smi >/dev/null; then
    listed=$(timeout 30 nvidia-smi --list-gpus 2>&1) || failed=$?
    if ((failed)); then
      warn "nvidia-smi fails on $SLURMD_NODENAME with $failed: ${listed:0:200}"
      node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$SLURMD_NODENAME" | tail -n 1) || true
      [[ -z $node ]] || listed=$(timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" nvidia-smi --list-gpus) || true
      gpus=${SLURM_GPUS_ON_NODE:-0}
    fi
    ((gpus > 0)) || gpus=$(grep -c '^GPU [0-9]' <<<"$listed") || true
    ((gpus == 0 || ${SLURM_GPUS_ON_NODE:-0} <= gpus)) || gpus=$SLURM_GPUS_ON_NODE
  fi
  ranks_per_node=${PHI3V_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}
}

cpus_per_rank() { # the cores of this node, divided among its ranks
  echo $((SLURM_CPUS_ON_NODE > ranks_per_node ? SLURM_CPUS_ON_NODE / ranks_per_node : 1))
}

choose_nodes() { # choose_nodes SETTINGS…: nodes examine themselves; those that are fit, and ended no starts, are used
  local wanted least waited=0
  wanted=${PHI3V_NODES:-$SLURM_JOB_NUM_NODES} least=${PHI3V_MIN_NODES:-${PHI3V_NODES:-$SLURM_JOB_NUM_NODES}}
  while true; do
    life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$((++start))
    require_own_life
    hosts=$(shielded hosts_of_job)
    call_deputy
    export PHI3V_EXAMINE_S # within which the doctor makes an end
    on_nodes examine "$hosts" 1 --no-kill --kill-on-bad-exit=0 -- python -m phi3v_dist.cli.doctor --report "$run/preflight" \
      --token "$life" --ranks-per-node "$ranks_per_node" "$@" &
    wait_for_reports $! "$(count "$hosts")"
    ask nodes "$run" --life "$life" --hosts "$hosts" --wanted "$wanted" --least "$least" \
      --waited "$waited" --time-left "$(shielded seconds_left)" ${noticed:+--noticed}
    case ${answer[action]} in
    train) break ;;
    wait) ((++waited)) && pause "$AGAIN_S" ;;
    requeue) come_back ;;
    *) exit "${answer[code]}" ;;
    esac
  done
  use=${answer[use]}
}

wait_for_reports() { # wait_for_reports PID NUM_NODES: until all are through, or half of them are and the rest is late
  local waited_s=0 late_s=0
  while kill -0 "$1" 2>/dev/null; do
    pause "$LOOK_S"
    ((waited_s += LOOK_S, 2 * $(shielded count_through) < $2)) || ((late_s += LOOK_S))
    if [[ -n $noticed ]] || ((waited_s >= PHI3V_EXAMINE_S + LATE_S || late_s >= LATE_S)); then
      end_step examine "$1"
    fi
  done
  wait_for "$1"
}

count_through() { # nodes that have examined themselves to the end
  { grep -lsZ "\"token\": \"$life\"" "$run"/preflight/*.json | xargs -0r grep -l '"is_complete": true' || true; } | wc -l
}

stage() { # stage SETTINGS…: each node copies the shards to its own disk, if asked to; the others are read where they are
  local waited_s=0 noticed_s=0
  [[ -n $PHI3V_STAGE ]] || return 0
  say "each node copies the shards to $PHI3V_STAGE"
  on_nodes stage "$use" 1 --no-kill --kill-on-bad-exit=0 -- python -m phi3v_dist.cli.prepare stage "$@" &
  step_pid=$!
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  while kill -0 "$step_pid" 2>/dev/null; do
    pause "$LOOK_S"
    [[ -z $noticed ]] || ((noticed_s += LOOK_S))
    (((waited_s += LOOK_S) < PHI3V_STAGE_S && noticed_s < LATE_S)) || end_step stage "$step_pid"
  done
  wait_for "$step_pid"
  step_pid=""
  ((status == 0)) || warn "not every node could copy the shards (see $run/logs): they are read where they are"
  [[ -z $noticed ]] || judge --not-begun # ends here
}

tell_ranks() { # which start this is, where to leave their last word, how long the job has
  local left
  export PHI3V_START=$start PHI3V_LAST_WORD=$run/attempts/last-word-$life.json PHI3V_TIME_LEFT_S
  left=$(shielded seconds_left)
  if [[ -n $left ]] && ((left >= SHORT_S)); then
    PHI3V_TIME_LEFT_S=$((left - MARGIN_S))
  else
    unset PHI3V_TIME_LEFT_S
  fi
}

watch_over() { # watch_over PID: until the ranks have ended, or srun only waits for a node that is gone
  local log attempt="" beat last_beat="" over_s=0 silent_s=0
  step_pid=$1
  (trap '' TERM && exec tail --lines=0 --follow=name --retry "$run/logs/${use%%,*}.log" 2>/dev/null) &
  log=$!
  [[ -z $noticed ]] || notice "$noticed" # it came while the step began
  while kill -0 "$step_pid" 2>/dev/null; do
    pause "$LOOK_S"
    [[ -z $noticed ]] || before_it_is_late
    [[ -n $attempt ]] || attempt=$(shielded own_attempt)
    if [[ -e $PHI3V_LAST_WORD ]] || grep -qs '"verdict": {' "$attempt"/node-*.json; then
      ((over_s += LOOK_S))
    fi
    if beat=$(shielded cat "$attempt/alive" 2>/dev/null); then # a disk that is away says nothing about the ranks
      if [[ $beat == "$last_beat" ]]; then ((silent_s += LOOK_S)); else silent_s=0 last_beat=$beat; fi
    fi
    if ((over_s > OVER_S || silent_s > SILENT_S)); then
      warn "the ranks have ended and srun has not: it is ended, and a node is probably gone"
      end_step train "$step_pid"
    fi
  done
  wait_for "$step_pid"
  step_pid=""
  sleep 1 || true # for the last lines of the log
  { kill -KILL "$log" && wait "$log"; } 2>/dev/null || true
}

before_it_is_late() { # Slurm does not bring a job back that it has ended at its time limit
  local left
  left=$(shielded seconds_left)
  if [[ -n $left ]] && ((left < LAST_S)); then
    warn "the ranks have not saved in time"
    answer=()
    come_back
  fi
}

call_deputy() {                     # on another node than this: a job with --no-kill outlives this one
  local node container=() inside=() # scontrol is not to be had in a container
  [[ -z $deputy ]] || ! kill -0 "$deputy" 2>/dev/null || return 0
  pause 0
  for node in $(tr , '\n' <<<"$hosts" | tac); do
    [[ $node != "$SLURMD_NODENAME" ]] || continue
    on_nodes deputy "$node" 1 -- slurm/deputy.sh "$counter" "$job" &
    deputy=$!
    return 0
  done
}

dismiss_deputy() { # it leaves by itself, unless its node is gone
  local waited_s=0
  [[ -z $counter ]] || rm -f "$counter"
  counter=""
  while [[ -n $deputy ]] && kill -0 "$deputy" 2>/dev/null && ((waited_s++ < 3)); do sleep 1 || true; done
}

own_attempt() { # folder of the attempt that this start has made; nothing before that. Others may try the folder, too
  local folders=("$run"/attempts/[0-9]*) number owner
  for ((number = ${#folders[@]} - 1; number >= 0 && number >= ${#folders[@]} - 9; number--)); do
    owner=$(cat "${folders[number]}/owner.json" 2>/dev/null) || continue
    [[ $owner == *"\"job\": \"$SLURM_JOB_ID\","* && $owner == *"\"restart\": ${SLURM_RESTART_COUNT:-0},"* &&
      $owner == *"\"start\": $start,"* ]] || continue
    echo "${folders[number]}"
    return 0
  done
}

judge() { # judge OPTION…, of phi3v_dist.cli.job: how the start ended. Returns when another one in place may help
  ask judge "$run" --life "$life" "$@"
  rm -f "$run/attempts/last-word-$life.json"
  case ${answer[action]} in
  done) exit 0 ;;
  requeue) come_back ;;
  again) say "starting again on the nodes that are left" ;;
  *) exit "${answer[code]}" ;;
  esac
}

come_back() { # queue the job again, without the nodes of the answer that are bad; ends here
  local state="" bad=${answer[bad]:-} tries=0
  trap '' TERM USR1 # requeueing ends this script
  require_own_life
  dismiss_deputy
  until [[ $state == RUNNING || $state == PENDING ]] || ((++tries > 5)); do # others may pass within a moment
    [[ -z $state ]] || pause 1
    state=$(known --format=%T) || true
  done
  case $state in
  RUNNING)
    insist scontrol requeue "$job" ||
      give_up 1 "the job cannot be queued again: to go on, submit it again with the same words"
    say "queued again${bad:+, without $bad}"
    ;;
  PENDING) say "Slurm has queued the job again${bad:+; it is to come back without $bad}" ;;
  *) say "Slurm is ending the job ($state): to go on, submit it again with the same words, unless it comes back" ;;
  esac
  leave_out "$bad" "${answer[forgive]:-}"
  exit 0
}
