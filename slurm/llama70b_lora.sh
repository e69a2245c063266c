#!/usr/bin/env bash
#SBATCH --job-name=llama70b_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Llama-3.1-70B with LoRA on one node.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here launch/recipes/llama3.1_70b_lora.yaml "$@"
