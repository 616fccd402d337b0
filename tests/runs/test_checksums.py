import json

import pytest

from mmtard.errors import UserError
from mmtard.runs import checksums


@pytest.fixture
def run(tmp_path):
    (tmp_path / "start").mkdir()
    with checksums.renewed(tmp_path, "start"):
        for name in ("weights", "config"):
            (tmp_path / "start" / name).write_text(name)
    with checksums.renewed(tmp_path, "single"):
        (tmp_path / "single").write_text("x")
    return tmp_path


def test_what_was_recorded_and_is_as_it_was_passes(run):
    assert checksums.why_damaged(run, "start") is None and checksums.why_damaged(run, "single") is None
    assert json.loads((run / "checksums.json").read_text())["files"].keys() == {
        "start/weights",
        "start/config",
        "single",
    }


@pytest.mark.parametrize("content", ["Weights", "weight", ""])
def test_one_other_bit_is_refused_with_the_remedy(run, content):
    (run / "start" / "weights").write_text(content)
    with pytest.raises(UserError, match="start/weights' does not match its checksum in checksums.json.*; put it back$"):
        checksums.verify(run, "start", "put it back")
    checksums.verify(run, "single", "")


def test_a_missing_file_is_told(run):
    (run / "start" / "weights").unlink()
    assert "cannot be read: No such file" in checksums.why_damaged(run, "start")


def test_an_interrupted_write_leaves_no_checksum_that_does_not_fit(run):
    with pytest.raises(KeyboardInterrupt), checksums.renewed(run, "single"):
        (run / "single").write_text("half")
        raise KeyboardInterrupt
    checksums.verify(run, "single", "")
    assert checksums.why_damaged(run, "start") is None


def test_a_run_of_an_earlier_version_is_not_checked(tmp_path):
    assert checksums.why_damaged(tmp_path, "start") is None


def test_a_strangers_checksums_name_nothing_outside_of_the_run(run):
    """`start/../../../../dev/zero` would be read for ever."""
    (run / "checksums.json").write_text(json.dumps({"files": {f"start/{'../' * 40}dev/zero": {}}}))
    with pytest.raises(UserError, match="checksums.json' is damaged"):
        checksums.why_damaged(run, "start")
