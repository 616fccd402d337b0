# Sourced by launch/quickstart.sh and tests/run.sh: a virtual environment in .venv with the tested versions.
# environment EXTRAS : creates or updates .venv with mmtard and its extras ("" or "[test]"); again when versions change.

environment() {
    local extras=$1 python=${PYTHON:-python3} stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "mmtard needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || true)." \
            "Set PYTHON to one, e.g. PYTHON=python3.12" >&2
        return 2
    fi
    stamp=".venv/mmtard-installed$extras"
    if [ -f "$stamp" ] && [ "$stamp" -nt setup.cfg ] && [ "$stamp" -nt constraints.txt ] &&
        .venv/bin/python -c 'import mmtard' 2>/dev/null; then
        return 0
    fi
    echo "Installing into .venv (some minutes and 6 GB the first time)..."
    # Not over one that works: with another Python than it was made with, it would be half of each.
    if ! .venv/bin/python -c 'import pip, ssl' 2>/dev/null && ! "$python" -m venv --clear .venv; then
        echo "cannot create .venv with '$python'; install its venv module (Debian: apt-get install python3-venv)" >&2
        return 1
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras" || return 1
    touch "$stamp"
}
