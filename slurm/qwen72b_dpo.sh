#!/usr/bin/env bash
#SBATCH --job-name=qwen72b_dpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# DPO of Qwen2.5-72B: sbatch slurm/qwen72b_dpo.sh --model.path FOLDER --data.train FILE.jsonl
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here launch/recipes/qwen2.5_72b_dpo.yaml "$@"
