#!/usr/bin/env bash
# The main job on a bare machine: sets up .venv, then renders images, pretrains a tiny CLIP, trains two teachers, distils a robust
# student on 2 ZeRO ranks, and prints how robust it became. A second call skips what is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment ""
exec .venv/bin/python -m mmtard.quickstart
