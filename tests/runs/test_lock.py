"""One start at a time, also on a file system that knows no locks."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from mmtard.errors import UserError
from mmtard.runs import lock


@pytest.fixture
def no_locks(monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 0.0)


def owner(run, host, pid):
    (run / ".owner").write_text(json.dumps({"host": host, "pid": pid}))


def test_a_lock_is_held_as_long_as_what_was_taken_is_kept(tmp_path):
    taken = lock.take(tmp_path)
    code = f"from pathlib import Path; from mmtard.runs import lock; print(lock.is_taken(Path({str(tmp_path)!r})))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert seen.stdout == "True\n", seen
    assert socket.gethostname() in (tmp_path / ".lock").read_text()
    taken[0].close()


def test_without_locks_a_file_stands_for_one_and_goes_with_its_holder(tmp_path, no_locks):
    taken = lock.take(tmp_path)
    assert lock.is_taken(tmp_path) and json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by {socket.gethostname()} process {os.getpid()}; wait for it to end"):
        lock.take(tmp_path)
    taken.clear()
    assert not (tmp_path / ".owner").exists() and not lock.is_taken(tmp_path)


def test_without_locks_the_file_of_a_process_that_was_killed_is_taken_over(tmp_path, no_locks):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner(tmp_path, socket.gethostname(), gone.pid)
    assert lock.take(tmp_path) and json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [None, "", "{", '{"host": 3}', "[]"])
def test_without_locks_another_nodes_file_is_taken_over_when_nothing_beats(tmp_path, no_locks, content):
    owner(tmp_path, "node7", 1)
    if content is not None:
        (tmp_path / ".owner").write_text(content)
    assert lock.take(tmp_path) and json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()


def test_without_locks_another_node_whose_heart_beats_keeps_the_folder(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 9.0)
    owner(tmp_path, "node7", 31)
    (tmp_path / ".heartbeat").mkdir()
    beats = iter(range(99))
    monkeypatch.setattr(
        lock.time, "sleep", lambda _: (tmp_path / ".heartbeat" / "rank-0.json").write_text(str(next(beats)))
    )
    with pytest.raises(UserError, match="is in use by node7 process 31"):
        lock.take(tmp_path)


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="cannot be opened"):
        lock.take(tmp_path)
    assert not (tmp_path / "victim").exists()


def test_without_locks_a_long_wait_is_told_once_too(tmp_path, no_locks, monkeypatch, capsys):
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 1.2)
    monkeypatch.setattr(lock, "QUIET_S", 0.2)
    owner(tmp_path, "node7", 31)
    assert lock.take(tmp_path)
    told = f"mmtard: run_dir: '{tmp_path}' is in use by node7 process 31; waiting up to 1 s for its end\n"
    assert capsys.readouterr().err == told
