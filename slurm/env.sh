# shellcheck shell=bash disable=SC2034 # job.sh reads what is set here
# Where the software is, in one place: sourced by train.sh on the first node of a job. Choose one way; the first that is
# set wins. Each variable can also come from the environment of `sbatch`.

# --- your cluster's own lines: modules, proxies, NCCL --------------------------------------------------------------
# module purge && module load cuda nccl
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5    # only when NCCL picks the wrong network: see README.md

# --- 1. a container through pyxis/enroot: a name or a .sqsh file -------------------------------------------------------
PHI3V_PYXIS=${PHI3V_PYXIS:-}
# --- 2. a container through apptainer: a .sif file, made from slurm/phi3v.def ------------------------------------------
PHI3V_APPTAINER=${PHI3V_APPTAINER:-}
# What containers see of the file systems beside the repository, as SOURCE:TARGET, comma-separated
PHI3V_MOUNTS=${PHI3V_MOUNTS:-}
[[ -z $PHI3V_STAGE ]] || PHI3V_MOUNTS=${PHI3V_MOUNTS:+$PHI3V_MOUNTS,}$PHI3V_STAGE:$PHI3V_STAGE
# --- 3. a virtual environment, or the folder of a conda environment: here the one that `make setup` makes --------------
PHI3V_VENV=${PHI3V_VENV:-$PWD/.venv}

container=() # options of srun
inside=()    # words before a command
# Images hold libraries; the program is this repository, if this is one
if [[ -n $PHI3V_PYXIS$PHI3V_APPTAINER && -d phi3v_dist ]]; then
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
if [[ -n $PHI3V_PYXIS ]]; then
  container=(--container-image="$PHI3V_PYXIS" --container-mounts="$PWD:$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}"
    --container-workdir="$PWD" --no-container-mount-home)
elif [[ -n $PHI3V_APPTAINER ]]; then
  command -v apptainer >/dev/null ||
    give_up 5 "PHI3V_APPTAINER is set, and there is no apptainer on $HOSTNAME: load its module in slurm/env.sh"
  [[ -e $PHI3V_APPTAINER || $PHI3V_APPTAINER == *://* ]] || give_up 5 "there is no container $PHI3V_APPTAINER"
  inside=(apptainer exec --cleanenv=false --bind "$PWD${PHI3V_MOUNTS:+,$PHI3V_MOUNTS}" --pwd "$PWD")
  [[ -e /dev/nvidiactl ]] && inside+=(--nv)
  inside+=("$PHI3V_APPTAINER")
else
  [[ -x $PHI3V_VENV/bin/python ]] ||
    give_up 5 "there is no Python at $PHI3V_VENV/bin/python: run 'make setup' on the login node, or set PHI3V_VENV (slurm/env.sh)"
  export PATH=$PHI3V_VENV/bin:$PATH
fi
