#!/bin/bash
# Measures a model on several datasets, each in a task of a job array. Write your account and partition into the two
# lines below. Then, from the project's folder, with one array task for each dataset, or for each folder of datasets:
#
#   sbatch --array=0-1 slurm/evaluate.sh runs/b32 /data/imagenet/val /data/clip_benchmark -- --protocol fare
#
# --array=1 with the same words repeats task 1 alone; task 0 is repeated by naming its dataset alone, without --array.
#
# What follows `--` goes to `mmtard evaluate`. An evaluation that is preempted goes on where it was, twenty times at
# most. The log keeps all starts; what the ranks of one print is also in mmtard-evaluate-<job>_<task>-start<N>.log.
#
# slurm/train_vitb32.sh says how nodes of another kind, modules and containers are told.

#SBATCH --account=YOUR_ACCOUNT
#SBATCH --partition=YOUR_PARTITION

#SBATCH --array=0
#SBATCH --job-name=mmtard-evaluate
#SBATCH --output=%x-%A_%a.log
#SBATCH --time=4:00:00
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

. "${MMTARD_SETUP:-/dev/null}" # a file of yours, e.g. one that loads modules
set -eu
exec "${MMTARD_PYTHON:-python}" -m mmtard.launch.batch --script "$0" evaluate -- "$@"
