"""A folder is replaced only while it holds what mmtard wrote there and nothing else."""

import json
import os

import pytest

from mmtard.errors import UserError
from mmtard.report.output_folder import LIST, output_folder


def write(out, kind="report", **files):
    with output_folder(out, kind, "choose another") as scratch:
        for name, text in files.items():
            (scratch / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != LIST}


def test_what_was_written_is_replaced_whole(tmp_path):
    write(tmp_path / "out", a="1", b="2")
    write(tmp_path / "out", b="3")
    assert contents(tmp_path / "out") == {"b": "3"} and os.listdir(tmp_path) == ["out"]


def _clone(out):
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")


def _empty_folder(out):
    (out / "mine").mkdir()


@pytest.mark.parametrize(
    "change, named",
    [
        (_clone, ".git/HEAD"),
        (_empty_folder, "mine"),
        (lambda out: (out / "NOTES.md").write_text("mine"), "NOTES.md"),
        (lambda out: (out / "a").write_text("edited by hand"), "a"),
        (lambda out: (out / "link").symlink_to("/etc"), "link"),
    ],
)
def test_what_someone_added_or_edited_stays(tmp_path, change, named):
    out = tmp_path / "out"
    write(out, a="1")
    change(out)
    before = sorted(str(path) for path in out.rglob("*"))
    with pytest.raises(UserError, match=rf"holds files that mmtard did not write \({named}\); choose another"):
        write(out, a="2")
    assert sorted(str(path) for path in out.rglob("*")) == before and os.listdir(tmp_path) == ["out"]


def test_a_folder_of_the_users_is_never_taken_for_ours(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, a="1")  # an empty one is
    with pytest.raises(UserError, match="is no export of mmtard"):
        write(out, "export", a="2")  # what another command wrote is not
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is no report of mmtard; choose another"):
            write(path, a="2")
    assert contents(out) == {"a": "1"} and (tmp_path / "file").read_text() == "mine"


def test_an_error_leaves_the_old_folder_and_no_scratch(tmp_path):
    write(tmp_path / "out", a="1")
    with pytest.raises(UserError, match=r"cannot write '.*out': No space left on device \(.* MiB free there\); choose"):
        with output_folder(tmp_path / "out", "report", "choose another"):
            raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out", "report", "choose another") as scratch:
        (scratch / "a").write_text("2")
        raise KeyboardInterrupt
    assert contents(tmp_path / "out") == {"a": "1"} and os.listdir(tmp_path) == ["out"]


def test_planted_links_are_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("mine")
    for name in (".out.writing", ".out.exporting", ".out.x.writing", ".out.partial", "out.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write(tmp_path / "out", a="1")
    assert (tmp_path / "precious" / "a").read_text() == "mine" and contents(tmp_path / "out") == {"a": "1"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name, pid in ((".out.dead.writing", 2**22 + 1), (".out.alive.writing", os.getpid())):
        (tmp_path / name).mkdir()
        content = {"kind": "report", "files": {}, "writer": [os.uname().nodename, pid]}
        (tmp_path / name / LIST).write_text(json.dumps(content))
    (tmp_path / ".out.mine.writing").mkdir()
    write(tmp_path / "out", a="1")
    assert sorted(os.listdir(tmp_path)) == [".out.alive.writing", ".out.mine.writing", "out"]
