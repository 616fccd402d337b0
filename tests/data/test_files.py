"""Files written beside and renamed, folders that may be replaced, and work spread over processes."""

import signal
import subprocess
import sys
import time

import pytest
from processes import alive

from mmtard.errors import UserError
from mmtard.files import exclusive, held, publish, write_text
from mmtard.folders import replace_folder

WORK = """
import os, sys, time
from pathlib import Path
from mmtard.data.worker_pool import map_in_processes
from mmtard.files import exclusive

def wait(i):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

with exclusive(Path(sys.argv[1]) / "lock"):
    map_in_processes(wait, [0, 1], 2, "work", False)
"""


def test_the_workers_of_a_killed_parent_end_and_give_its_lock_free(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)])
    until = time.monotonic() + 60
    while len(workers := [p.name for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < until, "they wait for ever"
        time.sleep(0.05)
    assert not held(tmp_path / "lock")


def test_a_link_left_where_a_file_is_written_is_replaced_and_what_it_points_at_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "out.json").symlink_to(precious)
    write_text(tmp_path / "out.json", "mine")
    assert (precious.read_text(), (tmp_path / "out.json").read_text()) == ("precious", "mine")
    assert not (tmp_path / "out.json").is_symlink()
    with publish(tmp_path / "a") as one, publish(tmp_path / "a") as other:
        assert one != other, "the name beside the file cannot be known beforehand"
        one.touch(), other.touch()
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError), exclusive(tmp_path / "lock"):
        pass


def write_report(folder, text="new"):
    with replace_folder(folder, "report") as scratch:
        (scratch / "figures").mkdir()
        (scratch / "index.html").write_text(text)


def test_a_folder_of_its_own_is_replaced_whole_and_no_scratch_stays(tmp_path):
    out = tmp_path / "out"
    write_report(out, "old")
    write_report(out, "new")
    assert (out / "index.html").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(RuntimeError), replace_folder(out, "report") as scratch:
        (scratch / "half").touch()
        raise RuntimeError
    assert (out / "index.html").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "kind", ["not made here", "of another kind", "a file of the user's in it", "an edited file", "a link", "a file"]
)
def test_a_folder_that_is_not_its_own_is_refused_and_stays(tmp_path, kind):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    if kind == "a link":
        out.symlink_to(mine)
    elif kind == "a file":
        out.write_text("precious")
    elif kind == "not made here":
        mine.rename(out)
    elif kind == "of another kind":
        with replace_folder(out, "model") as scratch:
            (scratch / "weights").touch()
    elif kind == "an edited file":
        write_report(out)
        (out / "index.html").write_text("the user's words")
    else:
        write_report(out)
        (out / "figures" / ".git").symlink_to(mine)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="mmtard|not a folder"):
        write_report(out)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
