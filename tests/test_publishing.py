"""Files that several processes and nodes share."""

import errno
import fcntl
import os
import threading
import time

import pytest

from mmtard import files
from mmtard.errors import UserError


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_what_they_guard_is_still_done(tmp_path, monkeypatch, answer):
    """Lustre mounted without flock."""

    def flock(*_):
        raise OSError(answer, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.exclusive(tmp_path / "lock"):
        done = True
    assert done and not (tmp_path / "lock").exists()


def test_another_error_of_a_lock_is_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output"), files.exclusive(tmp_path / "lock"):
        pass
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_another_node_made_is_waited_for(tmp_path):
    path = tmp_path / "run" / "resume.jsonl"

    def make():
        path.parent.mkdir()
        path.touch()

    maker = threading.Timer(0.3, make)
    maker.start()
    began = time.monotonic()
    files.wait_for(path, patience_s=20)
    maker.join()
    assert 0.2 < time.monotonic() - began < 10


def test_what_never_comes_is_told_with_the_remedy(tmp_path):
    with pytest.raises(
        UserError, match="is not seen on .* after 0 seconds; put run_dir on a file system that all nodes"
    ):
        files.wait_for(tmp_path / "never", patience_s=0.0)


def test_discard_removes_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    files.discard(tmp_path / "link")
    files.discard(tmp_path / "nothing")
    assert (tmp_path / "folder" / "file").exists() and not (tmp_path / "link").is_symlink()
    files.discard(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_full_disk_is_named_with_what_it_lacks(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    told = files.why_not_written(tmp_path / "not" / "there", full, 3 * 2**30)
    assert told.startswith(f"cannot write '{tmp_path}/not/there': No space left on device (the disk at '/")
    assert told.endswith(" free, 3.0 GiB needed); free space there, then start again")
    denied = OSError(errno.EACCES, "Permission denied")
    assert files.why_not_written(tmp_path, denied) == f"cannot write '{tmp_path}': Permission denied"
