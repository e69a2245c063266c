#!/usr/bin/env bash
#SBATCH --job-name=qwen3_235b_a22b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Qwen3-235B-A22B on 1,024 GPUs. Expert groups of 32 exchange over InfiniBand, hence --fast-domain.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here --fast-domain 32 launch/recipes/qwen3_235b_a22b_1024gpus.yaml "$@"
