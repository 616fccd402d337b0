#!/usr/bin/env bash
# Objectives side by side on CIFAR-10 at an equal budget, each with three seeds: sets up .venv and runs the study
# configs/studies/cifar10.yaml. A second call goes on where the first was interrupted.
#
#   bash launch/compare_cifar10.sh CIFAR10 [key=value ...]
#
# CIFAR10: a folder with train/ and test/ images, one sub-folder a class, or with archives *train*.npz and *test*.npz of
# encoded images. key=value: of the study, such as settings.train.steps=100 or seeds=[0].
set -euo pipefail
if [ $# -eq 0 ]; then sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
if [ -e "$1" ]; then set -- "$(realpath -- "$1")" "${@:2}"; fi # as seen from where this was called
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment ""
exec .venv/bin/mmtard study cifar10 "data.source=$1" "${@:2}"
