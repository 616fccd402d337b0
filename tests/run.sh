#!/usr/bin/env bash
# Sets up .venv and passes the tests; arguments go to pytest: bash tests/run.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment "[test]"
export PATH="$PATH:/usr/sbin" # where Debian puts the daemons of Slurm
if ! command -v slurmctld >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing Slurm for the tests that submit jobs..."
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm; } >/dev/null ||
            echo "Slurm could not be installed: the tests on a real Slurm will be skipped" >&2
    else
        echo "No Slurm here and no right to install it: the tests on a real Slurm will be skipped" >&2
    fi
fi
exec .venv/bin/python -m pytest "$@"
