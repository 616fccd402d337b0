#!/usr/bin/env bash
# Sets up .venv and passes the tests; arguments go to pytest: bash tests/run.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
environment "[test]"
export PATH="$PATH:/usr/sbin" # where Debian puts the daemons of Slurm

missing=() # packages, each with the tests that need it
command -v slurmctld >/dev/null || missing+=("slurm-wlm:tests on a real Slurm")
command -v chromium >/dev/null || missing+=("chromium:tests in a browser")
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing ${missing[*]%%:*} for the tests..."
    export DEBIAN_FRONTEND=noninteractive
    install=(apt-get install -y -qq --no-install-recommends)
    # At once, or, where the distribution lacks one of them, the others alone.
    {
        apt-get update -qq && "${install[@]}" "${missing[@]%%:*}" ||
            for one in "${missing[@]%%:*}"; do "${install[@]}" "$one" || true; done
    } >/dev/null || true
    hash -r
fi
for one in "${missing[@]}"; do
    dpkg -s "${one%%:*}" >/dev/null 2>&1 ||
        echo "${one%%:*} is missing and could not be installed: the ${one#*:} will be skipped" >&2
done
# The tests' tensors are tiny: a thread that waits for another costs more than it computes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two workers, since most tests use one core: -n 4 for more, -n 0 for one after the other.
exec .venv/bin/python -m pytest -n 2 --no-loadscope-reorder "$@"
