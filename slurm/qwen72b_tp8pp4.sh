#!/usr/bin/env bash
#SBATCH --job-name=qwen72b_tp8pp4
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Qwen2.5-72B, all parameters: TP8 in each node, a pipeline of 4 nodes. More nodes: more replicas.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here launch/recipes/qwen2.5_72b_tp8pp4.yaml "$@"
