#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=2:00:00
# Converts a model, on CPU cores only:  sbatch slurm/convert.sh SRC DST [--dtype bf16]
# Interrupted, it is taken up where it was: submit it again.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift convert "$@"
