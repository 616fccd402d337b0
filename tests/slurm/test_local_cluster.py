"""The throwaway cluster: what it starts and stops, and what it answers to a wrong command line."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import LOCAL_CLUSTER


def call(*words, **env):
    """(status, everything printed)"""
    command = [shutil.which("bash"), LOCAL_CLUSTER, *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return done.returncode, done.stdout


def runs(pid):
    try:
        return (
            b"" != Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # empty for one that ended and whose parent has not looked
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "usage: slurm/local_cluster.sh up DIR"),
        (["start"], "'start' is none of up, status, restore, down"),
        (["up"], "up: DIR is missing"),
        (["up", "there", "--nodes", "0"], "--nodes: '0' is not a number from 1 to 99"),
        (["up", "there", "--nodes"], "--nodes: '' is not a number from 1 to 99"),
        (["down", "there", "--nodes", "3"], "--nodes belongs to 'up', not to 'down'"),
        (["up", "there", "--cpus", "3"], "unknown option '--cpus'"),
        (["up", "here", "there"], "'there': one DIR only, and it is 'here'"),
        (["down", "there"], "there is no folder"),
    ],
)
def test_a_wrong_command_line_is_answered_with_what_is_wrong(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed = call(*words)
    assert status == 2 and told in printed
    assert not list(tmp_path.iterdir())


def test_a_missing_program_is_named_with_its_package(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cat", "hostname", "mkdir"):
        (programs / name).symlink_to(shutil.which(name))
    status, printed = call("up", tmp_path / "there", PATH=str(programs))
    assert status == 2
    assert "munged is missing; install it: apt-get install --no-install-recommends slurm-wlm" in printed


def test_a_folder_without_a_cluster_says_so(tmp_path):
    assert call("status", tmp_path)[0] == 2
    assert call("down", tmp_path) == (0, f"no cluster runs in {tmp_path}\n")


@pytest.mark.slow
def test_it_stops_only_the_daemons_that_it_started(cluster, tmp_path):
    assert call("up", tmp_path, "--nodes", "1")[0] == 0
    daemons = [int(line.split()[0]) for line in (tmp_path / "daemons").read_text().splitlines()]
    try:
        status, printed = call("up", tmp_path)
        assert status == 2 and "end it first" in printed
        status, printed = call("status", tmp_path)
        assert status == 0 and "slurmd.node1 runs" in printed
        os.kill(daemons[-1], signal.SIGKILL)
        assert call("status", tmp_path)[0] == 1
        assert call("restore", tmp_path) == (0, "slurmd.node1 runs again\n") and call("restore", tmp_path) == (0, "")
        daemons += [int(line.split()[0]) for line in (tmp_path / "daemons").read_text().splitlines()]
    finally:
        assert call("down", tmp_path)[0] == 0
    assert not any(runs(pid) for pid in daemons)
    assert call("status", cluster.folder)[0] == 0


@pytest.mark.slow
def test_it_listens_on_the_loopback_address_only(cluster):
    daemons = {line.split()[0] for line in (cluster.folder / "daemons").read_text().splitlines()}
    sockets = {
        os.readlink(fd.path) for pid in daemons for fd in os.scandir(f"/proc/{pid}/fd") if os.path.islink(fd.path)
    }
    listening = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/net/{name}").readlines()[1:]]
    addresses = [row[1].split(":")[0] for row in listening if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert len(addresses) == 7  # slurmctld and six slurmd
    assert all(address.endswith("7F") and len(address) == 8 for address in addresses)  # 127.x.x.x, its bytes reversed
