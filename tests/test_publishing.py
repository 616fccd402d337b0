"""Files that several processes and nodes share."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest

from mmtard import files, folders
from mmtard.errors import UserError
from mmtard.files import locks, writing


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


@pytest.fixture
def full_disk(monkeypatch):
    """No new file is made; what is there may be written over."""

    def write_text(path, text, sync=True):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_text", write_text)


def test_a_note_of_a_full_disk_is_written_over_the_old_text(tmp_path, full_disk):
    path = tmp_path / "note"
    path.write_text("a start\n")
    files.note_text(path, "a start, which ended\n")
    assert path.read_text() == "a start, which ended\n"
    files.note_text(path, "short\n")
    assert path.read_text() == "short\n"


def test_a_note_that_does_not_fit_in_place_leaves_the_old_text(tmp_path, full_disk, monkeypatch):
    path, overwrite = tmp_path / "note", writing._overwrite
    path.write_text("the old text\n")

    def four_bytes(file, content):
        if content != b"the old text\n":
            overwrite(file, content[:4])
            raise OSError(errno.ENOSPC, "No space left on device")
        overwrite(file, content)

    monkeypatch.setattr(writing, "_overwrite", four_bytes)
    with pytest.raises(OSError, match="No space left"):
        files.note_text(path, "another text\n")
    assert path.read_text() == "the old text\n"
    with pytest.raises(OSError, match="No space left"):
        files.note_text(tmp_path / "none yet", "text\n")


def test_a_note_goes_through_no_link(tmp_path, full_disk):
    (tmp_path / "theirs").write_text("theirs\n")
    (tmp_path / "note").symlink_to("theirs")
    with pytest.raises(OSError):
        files.note_text(tmp_path / "note", "ours\n")
    assert (tmp_path / "theirs").read_text() == "theirs\n"


def test_a_long_wait_for_another_process_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "QUIET_S", 0.05)
    held, leave = threading.Event(), threading.Event()

    def hold():
        with files.exclusive(tmp_path / "lock"):
            held.set()
            leave.wait(5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(5)
    threading.Timer(0.3, leave.set).start()
    with files.exclusive(tmp_path / "lock"):
        other.join()
    line = f"mmtard: another process works at '{tmp_path / 'lock'}'; waiting for its end\n"
    assert capsys.readouterr().err == line


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_makes_stays(tmp_path):
    (tmp_path / ".out.killed00.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".out.killed00.partial" / "sub" / "weights").touch()
    (tmp_path / ".other.killed00.partial").mkdir()
    with folders.replace_folder(tmp_path / "out", "report") as first:
        with folders.replace_folder(tmp_path / "out", "report") as second:
            (second / "page").write_text("second")
        assert first.is_dir()
        (first / "page").write_text("first")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.killed00.partial", "out"]
    assert (tmp_path / "out" / "page").read_text() == "first"


def test_a_sealed_record_is_known_to_be_whole():
    record = {"accuracy": 0.1 + 0.2, 3: [1, None], "eps": {"2/255": 1e-300}}
    sealed = json.loads(json.dumps(files.sealed(record)))
    assert files.opened(sealed) == (json.loads(json.dumps(record)), True)
    assert files.opened({**sealed, "accuracy": 0.3})[1] is False
    assert files.opened({"accuracy": 0.3}) == ({"accuracy": 0.3}, True), "of an earlier version"


def test_a_note_is_not_written_into_a_file_of_two_names(tmp_path, full_disk):
    (tmp_path / "note").write_text("theirs\n")
    os.link(tmp_path / "note", tmp_path / "other")
    with pytest.raises(OSError, match="No space left"):
        files.note_text(tmp_path / "note", "ours\n")
    assert (tmp_path / "other").read_text() == "theirs\n"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_what_is_no_file_is_refused_by_name_before_it_is_opened(tmp_path, make):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "whole.json").write_text("{}")
    (tmp_path / "run" / "gone").symlink_to("nowhere")
    (tmp_path / "run" / "self").symlink_to(".")
    files.refuse_special(tmp_path / "run")
    make(tmp_path / "run" / "deep" / "results.json")
    with pytest.raises(UserError, match="'.*run/deep/results.json' is a pipe or a device"):
        files.refuse_special(tmp_path / "run")
    (tmp_path / "run" / folders.MANIFEST).write_text('{"made_by": "mmtard", "kind": "report", "files": {}}')
    with pytest.raises(UserError, match="'.*run/deep/results.json' is a pipe or a device"):
        folders.check_replaceable(tmp_path / "run", "report")


def test_a_folder_of_someone_elses_is_refused_as_such_whatever_lies_in_it(tmp_path):
    (tmp_path / "mine").mkdir()
    os.mkfifo(tmp_path / "mine" / "pipe")
    with pytest.raises(UserError, match="mine' exists and is not a report that mmtard made"):
        folders.check_replaceable(tmp_path / "mine", "report")
    os.mkfifo(tmp_path / "mine" / folders.MANIFEST)
    with pytest.raises(UserError, match="mine' exists and is not a report that mmtard made"):
        folders.check_replaceable(tmp_path / "mine", "report")


def test_without_locks_nobody_is_known_to_hold_one(tmp_path, monkeypatch):
    """A killed `mmtard study` leaves its lock's file, and the next one must be able to go on."""

    def flock(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert not files.held(tmp_path / "lock")


def test_a_new_folder_that_another_process_takes_for_abandoned_is_made_once_more(tmp_path, monkeypatch):
    """Between its making and its lock it looks like what a killed process left."""
    make, made = folders.tempfile.mkdtemp, []

    def taken_at_once(**where):
        made.append(make(**where))
        if len(made) == 1:
            folders._remove_abandoned(tmp_path / "report")
        return made[-1]

    monkeypatch.setattr(folders.tempfile, "mkdtemp", taken_at_once)
    with folders.replace_folder(tmp_path / "report", "report") as scratch:
        (scratch / "page").write_text("x")
    assert len(made) == 2 and (tmp_path / "report" / "page").read_text() == "x"


def make_report(folder, text):
    with folders.replace_folder(folder, "report") as scratch:
        (scratch / "page").write_text(text)


def test_two_processes_that_replace_a_folder_at_the_same_moment_both_end_well(tmp_path, monkeypatch):
    """One puts its own there after the other has taken the old one away."""
    make_report(tmp_path / "out", "old")
    rename, renamed = folders.Path.rename, []

    def meanwhile(path, target):
        renamed.append(path.name)
        if len(renamed) == 2:  # the old one is away, the new one is not yet there
            make_report(tmp_path / "out", "the other's")
        return rename(path, target)

    monkeypatch.setattr(folders.Path, "rename", meanwhile)
    make_report(tmp_path / "out", "ours")
    assert (tmp_path / "out" / "page").read_text() == "ours" and len(renamed) > 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_replaced_while_it_is_looked_at_is_looked_at_anew(tmp_path, monkeypatch):
    make_report(tmp_path / "out", "old")
    digest, looked_at = folders._digest, []

    def meanwhile(path):
        looked_at.append(path)
        if len(looked_at) == 1:
            with monkeypatch.context() as undone:
                undone.setattr(folders, "_digest", digest)
                make_report(tmp_path / "out", "the other's")
        return digest(path)

    monkeypatch.setattr(folders, "_digest", meanwhile)
    folders.check_replaceable(tmp_path / "out", "report")
    assert len(looked_at) == 2


def test_a_folder_that_cannot_be_looked_into_is_one_line_and_stays(tmp_path, monkeypatch):
    make_report(tmp_path / "out", "old")
    with monkeypatch.context() as broken:
        broken.setattr(
            folders, "_digest", lambda path: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no right"))
        )
        with pytest.raises(UserError, match=r"out' cannot be looked into \(no right\); choose another folder"):
            folders.check_replaceable(tmp_path / "out", "report")
    (tmp_path / "out" / folders.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(UserError, match="exists and is not a report that mmtard made"):
        folders.check_replaceable(tmp_path / "out", "report")


def test_data_that_do_not_fit_on_the_disk_are_one_line_and_leave_nothing(tmp_path):
    with pytest.raises(UserError, match=r"cannot write '.*made/data': No space left on device \(the disk at"):
        with folders.publish_folder(tmp_path / "made" / "data", {}) as scratch:
            (scratch / "train.tar").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not any((tmp_path / "made").iterdir())
    with pytest.raises(FileNotFoundError, match="source"):
        with folders.publish_folder(tmp_path / "made" / "data", {}):
            open("/no/such/source")
