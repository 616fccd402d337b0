#!/usr/bin/env bash
# Objectives side by side on CIFAR-10 at an equal budget, with small towers on 2 ranks: sets up .venv, pretrains, trains
# teachers and students, measures them, and prints one table. A second call goes on where the first was interrupted.
#
#   bash launch/compare_cifar10.sh CIFAR10 [key=value ...]
#
# CIFAR10: a folder with train/ and test/ images, one sub-folder a class, or with archives *train*.npz and *test*.npz of
# encoded images.
set -euo pipefail
if [ -e "${1:-}" ]; then set -- "$(realpath -- "$1")" "${@:2}"; fi # as seen from where this was called
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment ""
# Threads that wait by spinning slow each other down wherever something else runs on the same cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec .venv/bin/python -m mmtard.examples.cifar10 "$@"
