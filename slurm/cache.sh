#!/bin/bash
# Stores the embeddings of the teachers that see clean images alone, so that the training on them, with
# teachers.NAME.stored=true, need not run those teachers. Write your account and partition into the two lines below.
# Then, from the project's folder, with the settings that you will train with (the batch of a rank, too, for the same
# last bits):
#
#   sbatch slurm/cache.sh data.shards=/data/imagenet/train
#
# An argument before the key=value settings, or MMTARD_CONFIG, names another configuration than
# configs/vitb32_mmtard.yaml. A job that is stopped goes on from the embeddings that are stored; the student's job can
# wait for it:
# sbatch --dependency=afterok:JOB slurm/train_vitb32.sh data.shards=/data/imagenet/train teachers.clean.stored=true
#
# slurm/train_vitb32.sh says how nodes of another kind, modules and containers are told.

#SBATCH --account=YOUR_ACCOUNT
#SBATCH --partition=YOUR_PARTITION

#SBATCH --job-name=mmtard-cache
#SBATCH --output=%x-%j.log
#SBATCH --time=4:00:00
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
exec "${MMTARD_PYTHON:-python}" -m mmtard.launch.batch --script "$0" cache -- "$@"
