#!/bin/bash
# Trains the two teachers of configs/vitb32_mmtard.yaml, each as a task of a job array that goes on by itself like
# slurm/train_vitb32.sh, with the same logs. Write your account and partition into the two lines below. Then, from the
# project's folder:
#
#   sbatch slurm/train_teachers.sh data.shards=/data/imagenet/train
#
# The student's job can wait for both: sbatch --dependency=afterok:JOB slurm/train_vitb32.sh
# data.shards=/data/imagenet/train
#
# slurm/train_vitb32.sh says how nodes of another kind, modules and containers are told.

#SBATCH --account=YOUR_ACCOUNT
#SBATCH --partition=YOUR_PARTITION

#SBATCH --array=0-1
#SBATCH --job-name=mmtard-teachers
#SBATCH --output=%x-%A_%a.log
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

. "${MMTARD_SETUP:-/dev/null}" # a file of yours, e.g. one that loads modules
set -eu
exec "${MMTARD_PYTHON:-python}" -m mmtard.launch.batch --script "$0" train \
    configs/teachers/clean_vitl14.yaml configs/teachers/pmg_aft2_vitl14.yaml -- "$@"
