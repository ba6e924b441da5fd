#!/usr/bin/env bash
# Inside a fresh CUDA development image (Ubuntu 24.04, Python 3.12): what phi3v-dist needs, pinned, with flash-attn built
# for this torch. Run by phi3v.def, or by hand for pyxis; docs/gpu-setup.md says how. The program itself stays outside: a
# job uses the repository that it was submitted from.
#
#   slurm/container.sh FOLDER       FOLDER: the repository, or what phi3v.def copies of it
set -euo pipefail
: "${FLASH_ATTN:=2.8.3.post2}" # another one, or `none`
: "${MAX_JOBS:=4}"             # compilers at a time: each needs several GB of memory
readonly VENV=/opt/phi3v
export MAX_JOBS DEBIAN_FRONTEND=noninteractive
folder=$1

apt-get update
apt-get install --yes --no-install-recommends python3 python3-venv python3-dev git
python3 -m venv "$VENV"
printf '#!/bin/sh\nexec %s/bin/python "$@"\n' "$VENV" >/usr/local/bin/python # pyxis keeps the image's own PATH
chmod +x /usr/local/bin/python
export PATH=$VENV/bin:$PATH
build=$(mktemp -d) # pip writes beside what it builds
cp -r "$folder"/{setup.py,setup.cfg,pyproject.toml,constraints.txt,README.md,LICENSE,phi3v_dist,launch,ds_configs,slurm} "$build"
pip install --no-cache-dir --constraint "$build/constraints.txt" "$build" nvidia-ml-py
pip uninstall --yes phi3v-dist
rm -r "$build"

if [[ $FLASH_ATTN != none ]]; then
  torch_cuda=$(python -c 'import torch; print(torch.version.cuda)')
  nvcc_cuda=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
  if [[ ${torch_cuda%%.*} != "${nvcc_cuda%%.*}" ]]; then
    echo "torch is built for CUDA $torch_cuda and this image has $nvcc_cuda: begin from an image of CUDA $torch_cuda" >&2
    exit 1
  fi
  pip install --no-cache-dir ninja packaging wheel setuptools
  pip install --no-cache-dir --no-build-isolation --no-deps "flash-attn==$FLASH_ATTN"
fi
