#!/usr/bin/env bash
#SBATCH --job-name=sweep_learning_rate
#SBATCH --array=0-3%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Four learning rates, two jobs at a time: task N takes value N and has a run folder of its own.
exec "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}/slurm/with_site.sh" \
    mcore-swift launch slurm --here --sweep 'schedule.learning_rate=[5.0e-5, 1.0e-4, 2.0e-4, 4.0e-4]' \
    launch/recipes/llama3.1_70b_lora.yaml "$@"
