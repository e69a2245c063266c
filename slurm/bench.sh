#!/usr/bin/env bash
#SBATCH --job-name=bench
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=0:30:00
# What one GPU does: Qwen3-8B's shape with 8 layers. FP8:  sbatch slurm/bench.sh --precision.fp8 tensorwise
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift train launch/recipes/bench_qwen3_8b_8layers.yaml "$@"
