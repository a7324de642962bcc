# shellcheck shell=bash
# What is yours, in one place: the scripts beside this one read it on the nodes, and before sbatch
#   . scripts/slurm/site.sh
# has the names below count for it. sbatch takes an environment variable over an #SBATCH line, and an option over both.

# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_EXCLUDE=node13

# module load cuda
# The interpreter itself, not `uv run`: SLURM's signal reaches every process of a step, and would end what stands between.
: "${PYTHON:=.venv/bin/python}"
# export HF_HOME=/shared/huggingface        # nodes without a network: weights that a login node fetched
# export NCCL_SOCKET_IFNAME=ib0             # if NCCL takes the wrong network
# export NCCL_DEBUG=INFO                    # if it does not start
