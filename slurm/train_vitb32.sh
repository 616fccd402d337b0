#!/bin/bash
# Trains the robust ViT-B/32 of configs/vitb32_mmtard.yaml on 2 nodes of 8 GPUs. The job stops itself before its time is up,
# or when it is preempted, saves its state, goes back to the queue and goes on in the same run folder until it is complete.
#
# Write your account and partition into the two lines below. Then, from the project's folder, in a shell where mmtard works:
#
#   sbatch slurm/train_vitb32.sh run_dir=runs/b32 data.shards=/data/imagenet/train
#   sbatch --nodes=4 slurm/train_vitb32.sh configs/other.yaml train.lr=1e-5
#
# An argument before the key=value settings, or MMTARD_CONFIG, names another configuration. The log is mmtard-vitb32-<job>.log.

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
# Every GPU of the nodes is asked for, so their memory and network are, too.
#SBATCH --exclusive
#SBATCH --mem=0
# USR2, since NCCL takes USR1. 120 s before the end: time for the step under way and for a checkpoint. Without `B:` the
# signal goes to the ranks and spares this shell, which waits for them.
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

config=${MMTARD_CONFIG:-configs/vitb32_mmtard.yaml}
if [[ ${1:-} == *.yaml && $1 != *=* ]]; then
    config=$1
    shift
fi

# The name alone may not resolve; the address is the one that Slurm itself reaches the node by.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
# Jobs that share a node need ports of their own, below the range that connections take theirs from.
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# srun does not inherit --cpus-per-task since Slurm 22.05, and would give each rank one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# A rank's work on the CPU is decoding, in loader processes; threads on top of those would fight for the same cores.
export OMP_NUM_THREADS=1
# Says why NCCL could not connect, and nothing when it could. If it picked the wrong network of your nodes, also export
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with the name of the right one (`ip -brief addr` lists them).
export NCCL_DEBUG=WARN
# A line in the log as soon as it is printed, and a traceback from a rank that crashes in native code.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID}: $*"; }

say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, ranks meet at $MASTER_ADDR:$MASTER_PORT, $config $*"

# One message about a wrong setting, rather than one from every rank.
python -m mmtard config "$config" "$@" >/dev/null

# A rank that is killed leaves the others waiting for it in a collective: end them, too.
status=0
srun --kill-on-bad-exit=1 --label python -m mmtard train "$config" "$@" || status=$?

# 75: the run saved its state and wants to be started again.
if [ "$status" -ne 75 ]; then
    say "training ended with status $status"
    exit "$status"
fi
# A task of an array by its own name: the last one shares its SLURM_JOB_ID with the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
say "stopped with its state saved, goes back to the queue"
scontrol requeue "${job:-$SLURM_JOB_ID}" || {
    say "could not go back to the queue; the same sbatch command goes on from the saved state"
    exit "$status"
}
