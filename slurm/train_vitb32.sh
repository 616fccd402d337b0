#!/bin/bash
# Trains the robust ViT-B/32 of configs/vitb32_mmtard.yaml on 2 nodes of 8 GPUs. The job stops itself before its time is
# up, or when it is preempted, saves its state, goes back to the queue and goes on in the same run folder until it is
# complete.
#
# Write your account and partition into the two lines below. Then, from the project's folder, in a shell where mmtard
# works:
#
#   sbatch slurm/train_vitb32.sh run_dir=runs/b32 data.shards=/data/imagenet/train
#   sbatch --nodes=4 slurm/train_vitb32.sh configs/other.yaml train.lr=1e-5
#
# An argument before the key=value settings, or MMTARD_CONFIG, names another configuration. The log,
# mmtard-vitb32-<job>.log, keeps all starts; what the ranks of one start print is also in
# mmtard-vitb32-<job>-start<N>.log.
#
# On nodes of another kind, say so, here or on the command line; a rank needs a GPU of its own. 4 GPUs and 64 cores:
#
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=16 slurm/train_vitb32.sh
#
# Variables fit this script, and those beside it, to a cluster: MMTARD_SETUP, a file of shell lines that come before
# Python, such as `module load`; MMTARD_PYTHON, the Python to run (default: python); MMTARD_SRUN, words after srun's own
# flags, such as `apptainer exec --nv mmtard.sif` or `--container-image=...`. Where jobs begin with an empty environment
# (--export=NONE), give sbatch --export=MMTARD_SETUP=/the/whole/path.sh.

#SBATCH --account=YOUR_ACCOUNT
#SBATCH --partition=YOUR_PARTITION

#SBATCH --job-name=mmtard-vitb32
#SBATCH --output=%x-%j.log
#SBATCH --time=24:00:00
#SBATCH --nodes=2
# One task a GPU; each of them sees all GPUs of its node and takes the one of its local rank.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
# Every GPU of the nodes is asked for, so their memory and network are, too. Not --gpus-per-task: NCCL could not then
# use the direct way between the GPUs of a node.
#SBATCH --exclusive
#SBATCH --mem=0
# USR2, since NCCL takes USR1. 120 s before the end: time for the step under way and for a checkpoint. Without `B:` the
# signal goes to the ranks and spares this shell, which waits for them.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

. "${MMTARD_SETUP:-/dev/null}" # a file of yours, e.g. one that loads modules
set -eu
exec "${MMTARD_PYTHON:-python}" -m mmtard.launch.batch --script "$0" train -- "$@"
