#!/usr/bin/env bash
# The main job on a bare machine: sets up .venv, then renders images, pretrains a tiny CLIP, trains two teachers,
# distils a robust student on 2 ZeRO ranks, and prints how robust it became. A second call skips what is done.
set -euo pipefail
if [ $# -gt 0 ]; then # such as --help
    sed -n 's/^# \(The main\|distils\)/\1/p' "$0"
    echo "It takes no arguments: bash launch/quickstart.sh"
    [ "$1" = -h ] || [ "$1" = --help ] || exit 2
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment ""
# Threads that wait by spinning slow each other down wherever something else runs on the same cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec .venv/bin/python -m mmtard.examples.quickstart
