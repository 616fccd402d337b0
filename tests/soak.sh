#!/usr/bin/env bash
# A soak: random kills of a tiny training (rank, all ranks, loader, launcher, checkpoint's write, probe, set-up, stop), and
# of evaluate, cache, export and shards, whose ends must have the bits of undisturbed ones.
#   bash tests/soak.sh [KILLS] [SEED] [LEDGER]     # 100 kills take about an hour on 2 cores that other work shares
# LEDGER: a file that keeps what is done, so that the same command goes on where it was cut.
set -euo pipefail
export MMTARD_SOAK_KILLS=${1:-100} MMTARD_SOAK_SEED=${2:-$RANDOM} MMTARD_SOAK_LEDGER=${3:-}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" -n 0 -q -s tests/parallel/test_soak.py
