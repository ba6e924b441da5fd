# shellcheck shell=bash disable=SC2034,SC2154 # its variables are those of job.sh and env.sh
# What a batch script needs of Slurm and of the nodes: run something there, end it, ask what is known of the job. Slurm's
# controller may be away for minutes, and a node may be gone; neither may end a run that is well.

readonly AWAY_S=600 # Slurm's controller may be away so long
readonly GONE_S=60  # and processes that were killed may take so long to be gone, and free their GPUs

say() { printf '%(%H:%M:%S)T %s%s\n' -1 "${job:+[job $job] }" "$*"; }

give_up() { # give_up CODE REASON
  say "$2" >&2
  exit "$1"
}

pause() { # pause SECONDS: that a signal may cut short
  sleep "$1" &
  wait $! || true
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
  while IFS= read -r line; do
    [[ ! $line =~ ^[a-z]+= ]] || answer[${line%%=*}]=${line#*=} # a module or library may print lines of its own
  done <<<"$lines"
}
declare -A answer

count() { wc -w <<<"${1//,/ }"; } # count A,B,…

on_nodes() { # on_nodes NAME NODES RANKS OPTIONS… -- COMMAND…: a step with so many ranks on each of these nodes
  local name=$1 nodes=$2 ranks=$3 number options=()
  shift 3
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  number=$(count "$nodes")
  trap '' TERM # Slurm sends it to this whole script, and srun would end the ranks
  exec srun --job-name="$life-$name" --overlap --mem=0 --nodelist="$nodes" --nodes="$number" \
    --ntasks-per-node="$ranks" --ntasks="$((number * ranks))" --output="${run//%/%%}/logs/%N.log" --open-mode=append \
    --unbuffered "${container[@]}" "${options[@]}" "${inside[@]}" "$@"
}

end_step() { # end_step NAME PID: srun waits for a node that is gone, or has had its time
  local waited_s step
  for ((waited_s = 0; waited_s < GONE_S; waited_s += 2)); do
    step=$(squeue --noheader --steps --jobs "$job" --format '%i %j' 2>/dev/null | sed -n "s/ $life-$1\$//p") || step=unknown
    [[ -n $step ]] || break
    [[ $step == unknown ]] || scancel --signal=KILL "$step" 2>/dev/null || true
    pause 2
  done
  kill -KILL "$2" 2>/dev/null || true
}

wait_for() { # wait_for PID: until it has ended, whatever signals come; its exit status is in `status`
  status=0
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1" || status=$?
}

notice() { # the job is going to be ended: the ranks save after the step in hand, and stop
  noticed=$1
  say "$1: the ranks are asked to save and to stop"
  [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2>/dev/null || true # srun passes it on
}

insist() { # insist COMMAND…: of Slurm's, until its controller can be reached; what it refuses is refused
  local waited_s message
  for ((waited_s = 0; waited_s < AWAY_S; waited_s += 2)); do
    if message=$("$@" 2>&1); then
      [[ -z $message ]] || printf '%s\n' "$message"
      return 0
    fi
    [[ $message =~ contact|imed\ out|onnect|ocket ]] || break
    pause 2
  done
  say "$1: $message" >&2
  return 1
}

ask_slurm() { # what it knows of the job, in the variable `fields`
  fields=$(insist scontrol show job "$job") || give_up 1 "Slurm does not know the job, or this node is cut off"
  [[ $(field Restarts) -le ${SLURM_RESTART_COUNT:-0} || $(field JobState) != RUNNING ]] ||
    give_up 0 "the job runs elsewhere by now: this is what was left of its restart ${SLURM_RESTART_COUNT:-0}"
}

field() { sed -n "s/^\(.* \)\?$1=\([^ ]*\).*/\2/p" <<<"$fields" | head -n 1; } # field NAME: of what Slurm knows

seconds_left() { # until Slurm ends the job, as its controller counts; nothing when there is no limit
  local text days=0 parts
  text=$(squeue --noheader --jobs "$job" --format %L 2>/dev/null) || return 0
  [[ $text =~ ^([0-9]+-)?([0-9]+:){0,2}[0-9]+$ ]] || return 0
  [[ $text != *-* ]] || days=${text%%-*}
  IFS=: read -ra parts <<<"0:0:${text#*-}"
  echo $((((10#$days * 24 + 10#${parts[-3]}) * 60 + 10#${parts[-2]}) * 60 + 10#${parts[-1]}))
}

leave_out() { # leave_out NODES FORGIVEN: the job shall come back without these, and may have those again
  local nodes
  [[ -n $1$2 ]] || return 0
  nodes=$(field ExcNodeList)
  [[ $nodes != "(null)" ]] || nodes=""
  nodes=$({
    [[ -z $nodes ]] || scontrol show hostnames "$nodes"
    tr , '\n' <<<"$1"
  } | grep -vxF -e "" -f <(tr , '\n' <<<"$2") | sort -u | paste -sd,) || true
  insist scontrol update JobId="$job" ExcNodeList="$nodes" ||
    say "the nodes could not be left out: scontrol update JobId=$job ExcNodeList=$nodes"
}
