#!/usr/bin/env bash
#SBATCH --job-name=deepseek_v3
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# DeepSeek-V3 on 2,048 GPUs. Expert groups of 64 exchange over InfiniBand, hence --fast-domain.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here --fast-domain 64 launch/recipes/deepseek_v3_2048gpus.yaml "$@"
