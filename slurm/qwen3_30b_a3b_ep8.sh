#!/usr/bin/env bash
#SBATCH --job-name=qwen3_30b_a3b_ep8
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Qwen3-30B-A3B, all parameters: its experts over the 8 GPUs of a node.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here launch/recipes/qwen3_30b_a3b_ep8.yaml "$@"
