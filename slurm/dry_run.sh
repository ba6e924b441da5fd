# shellcheck shell=bash disable=SC2154 # `sweep` is sweep.sh's, `container` and `inside` are env.sh's
# slurm/train.sh --dry-run, on the login node: what would be submitted, without submitting it.

dry_run() {
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
  check_environment
  source slurm/env.sh

  echo "Would be submitted, from $PWD:"
  printf '  sbatch'
  printf ' %q' "${options[@]}" "$script" "$@"
  printf '\n\nOptions in its header, for those not given there:\n'
  sed -n 's/^#SBATCH /  /p' "$script"
  [[ -z ${sweep:-} ]] || file=("$2")
  set -- "$1" "${@:2+${#file[@]}}"
  [[ -z $PHI3V_STAGE ]] || set -- "$@" "data.cache.path=$PHI3V_STAGE" data.cache.local_shards=true
  printf '\nWould run, on %s node(s):\n  srun --ntasks-per-node=%s' "$nodes" "${PHI3V_RANKS_PER_NODE:-GPUS_OF_A_NODE}"
  printf ' %q' "${container[@]}" "${inside[@]}" python -m phi3v_dist.cli.train --config "$@"
  printf '\n\n'
  if ((${#container[@]})); then
    echo "The settings were not looked at: what could do so is in $PHI3V_PYXIS"
  elif [[ -n ${sweep:-} ]]; then
    echo "What the tasks add, and their runs:"
    "${inside[@]}" python -m phi3v_dist.cli.job sweep --file "${file[0]}" --config "$@" || exit $?
  else
    echo "The settings say, for $((nodes * ranks)) rank(s), $ranks on each node (PHI3V_RANKS_PER_NODE=… says another number):"
    "${inside[@]}" python -m phi3v_dist.cli.check --world_size "$((nodes * ranks))" --config "$@" || exit $?
    "${inside[@]}" python -m phi3v_dist.cli.check --nodes "$nodes" --gpus-per-node "$ranks" --brief --config "$@" || exit $?
  fi
  command -v sbatch >/dev/null || give_up 0 "there is no sbatch here, so Slurm was not asked"
  printf '\nSlurm says:\n'
  sbatch --test-only "${options[@]}" "$script" "$1" "${file[@]}" "${@:2}" 2>&1
  exit
}

dry_run "$@"
