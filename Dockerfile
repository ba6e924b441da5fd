# The libraries of phi3v-dist on CUDA. The program is the repository, mounted when a container runs:
#
#   docker build --tag phi3v .
#   docker run --rm -it --gpus all --ipc host --volume "$PWD:/workspace" phi3v python launch/check.py --help
#
# slurm/phi3v.def builds the same image for apptainer. Both run slurm/container.sh. docs/gpu-setup.md says why so.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
ARG FLASH_ATTN=2.8.3.post2

COPY setup.py setup.cfg pyproject.toml constraints.txt README.md LICENSE /source/
COPY phi3v_dist /source/phi3v_dist
COPY launch /source/launch
COPY ds_configs /source/ds_configs
COPY slurm /source/slurm
RUN FLASH_ATTN=${FLASH_ATTN} bash /source/slurm/container.sh /source && rm -r /source

# The image has a user `ubuntu` with the number 1000
USER ubuntu
WORKDIR /workspace
ENV PATH=/opt/phi3v/bin:$PATH
CMD ["bash"]
