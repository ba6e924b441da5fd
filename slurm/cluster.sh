# shellcheck shell=bash disable=SC2034,SC2154 # its variables are those of job.sh and env.sh
# What a batch script needs of Slurm and of the nodes: run something there, end it, ask what is known of the job. Slurm's
# controller may be away for minutes, a node may be gone, a disk may be full; none of these may end a run that is well.
# At a notice Slurm sends SIGTERM to all of this script's processes, so what must not be lost is `shielded`.

readonly AWAY_S=600 # Slurm's controller may be away so long
readonly GONE_S=10  # and a step that was killed may take so long to be gone; one on a dead node never is

say() { printf '%(%Y-%m-%d %H:%M:%S)T INFO %s%s\n' -1 "${job:+[job $job] }" "$*" || true; }

give_up() { # give_up CODE REASON
  say "$2" >&2
  exit "$1"
}

shielded() { # shielded COMMAND…: in a $(…), which would not have this script's traps
  trap '' TERM USR1
  "$@"
}

pause() { # pause SECONDS: that a signal may cut short. Shows the deputy that this script lives
  [[ -z $counter ]] || echo "$SECONDS" 2>/dev/null >"$counter" || true
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

ask() { # ask VERB WORDS…: phi3v_dist.cli.job's answer, in the array `answer`
  local lines line
  lines=$(here python -m phi3v_dist.cli.job "$@") || give_up $? "phi3v_dist.cli.job $1 ended with $?"
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
  trap '' TERM # srun would end the ranks
  number=$(count "$nodes")
  exec srun --job-name="$life-$name" --overlap --mem=0 --nodelist="$nodes" --nodes="$number" \
    --ntasks-per-node="$ranks" --ntasks="$((number * ranks))" --output="${run//%/%%}/logs/%N.log" --open-mode=append \
    --unbuffered "${container[@]}" "${options[@]}" "${inside[@]}" "$@"
}

end_step() { # end_step NAME PID: srun waits for a node that is gone, or has had its time
  local until_s=$((SECONDS + GONE_S)) step
  while ((SECONDS < until_s)); do
    if step=$(shielded timeout 10 squeue --noheader --steps --jobs "$job" --format '%i %j' 2>/dev/null); then
      step=$(sed -n "s/ $life-$1\$//p" <<<"$step")
      [[ -n $step ]] || break
      (trap '' TERM && timeout 10 scancel --signal=KILL "$step" 2>/dev/null) || true
    fi
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
  [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2>/dev/null || true # srun passes it on
  say "$1: the ranks are asked to save and to stop"
}

insist() { # insist COMMAND…: of Slurm's, until its controller can be reached; what it refuses is refused
  local until_s=$((SECONDS + AWAY_S)) message
  while true; do
    if message=$(shielded "$@" 2>&1); then
      [[ -z $message ]] || printf '%s\n' "$message"
      return 0
    fi
    if [[ ! $message =~ contact|imed\ out|onnect|ocket ]] || ((SECONDS > until_s)); then break; fi
    pause 2
  done
  say "$1: $message" >&2
  return 1
}

known() { # known FORMAT: what Slurm's queue says of the job, never what a person has called it
  insist squeue --noheader --jobs "$job" "$1" | tr -d ' '
}

require_own_life() { # a node may have stood still while Slurm started the job elsewhere
  local state restarts
  if ! { state=$(shielded known --format=%T) && restarts=$(shielded known --Format=RestartCnt); }; then
    give_up 1 "Slurm does not know the job, or this node is cut off"
  fi
  if [[ $state == RUNNING && $restarts =~ ^[0-9]+$ ]] && ((restarts > ${SLURM_RESTART_COUNT:-0})); then
    give_up 0 "the job runs elsewhere by now: this is what was left of its restart ${SLURM_RESTART_COUNT:-0}"
  fi
}

hosts_of_job() { # A,B,…, as they are now
  scontrol show hostnames "$(known --format=%N)" | paste -sd,
}

seconds_left() { # until Slurm ends the job, as its controller counts; nothing when there is no limit
  local text days=0 parts
  text=$(timeout 30 squeue --noheader --jobs "$job" --format %L 2>/dev/null) || return 0
  [[ $text =~ ^([0-9]+-)?([0-9]+:){0,2}[0-9]+$ ]] || return 0
  [[ $text != *-* ]] || days=${text%%-*}
  IFS=: read -ra parts <<<"0:0:${text#*-}"
  echo $((((10#$days * 24 + 10#${parts[-3]}) * 60 + 10#${parts[-2]}) * 60 + 10#${parts[-1]}))
}

leave_out() { # leave_out NODES FORGIVEN: the job shall come back without these, and may have those again
  local nodes
  [[ -n $1$2 ]] || return 0
  nodes=$(known --format=%x) || true
  nodes=$({
    [[ -z $nodes || $nodes == "(null)" ]] || scontrol show hostnames "$nodes"
    tr , '\n' <<<"$1"
  } | grep -vxF -e "" -f <(tr , '\n' <<<"$2") | sort -u | paste -sd,) || true
  insist scontrol update JobId="$job" ExcNodeList="$nodes" ||
    say "the nodes could not be left out: scontrol update JobId=$job ExcNodeList=$nodes"
}
