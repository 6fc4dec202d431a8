#!/usr/bin/env bash
# One job for each back end: sbatch docs/examples/slurm.sh SCRIPT [ARGUMENTS]
#SBATCH --job-name=flash-rocm
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00
set -euo pipefail

backends=(auto ck triton)
export FLASH_ROCM_BACKEND="${backends[${SLURM_ARRAY_TASK_ID:-0}]}"
# Kernels that are compiled at first use stay on the node.
export TRITON_CACHE_DIR="${SLURM_TMPDIR:-/tmp}/triton-${SLURM_JOB_ID:-$$}"

flash-rocm info
srun torchrun --standalone --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" "$@"
