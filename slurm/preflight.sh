#!/bin/bash
# Checks in minutes, on nodes like those a training will get, what would otherwise stop it hours later: one PASS or FAIL
# line a check, and the job fails when a check does. Write your account and partition into the two lines below. Then,
# from the project's folder, with the options and settings that you will train with:
#
#   sbatch slurm/preflight.sh run_dir=runs/b32 data.shards=/data/imagenet/train
#
# An argument before the key=value settings, or MMTARD_CONFIG, names another configuration than
# configs/vitb32_mmtard.yaml.
#
# slurm/train_vitb32.sh says how nodes of another kind, modules and containers are told.

#SBATCH --account=YOUR_ACCOUNT
#SBATCH --partition=YOUR_PARTITION

#SBATCH --job-name=mmtard-preflight
#SBATCH --output=%x-%j.log
#SBATCH --time=00:20:00
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0

. "${MMTARD_SETUP:-/dev/null}" # a file of yours, e.g. one that loads modules
set -eu
exec "${MMTARD_PYTHON:-python}" -m mmtard.launch.batch --script "$0" preflight -- "$@"
