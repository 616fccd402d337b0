"""A benchmark's --out: looked at before anything is measured, and never over a file that is no benchmark's."""

import json
import os
import tempfile

import pytest

from mmtard.benchmarks.machine import Machine, measured
from mmtard.benchmarks.out_file import check_out, check_trace, scratch_folder
from mmtard.errors import UserError

CONFIG = {"train": {"batch_size": 8}}
FLOPS = {"teachers": 1.0, "attack": 1.0, "student": 1.0}
SECONDS = {"teachers": 1.0, "attack": 1.0, "student forward": 0.5, "student backward": 1.0}


def test_a_file_of_the_users_own_is_kept_and_named(tmp_path):
    for name, content in {
        "notes.md": "my notes",
        "mine.json": '{"a": 1}',
        "list.json": "[]",
        "deep.json": "[" * 10**5,
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(
            UserError, match=f"--out: '.*{name}' is there and is no result of mmtard bench; name another"
        ):
            check_out(tmp_path / name)
        with pytest.raises(UserError, match="--trace: .* is there and is no profile"):
            check_trace(tmp_path / name)
        assert (tmp_path / name).read_text() == content
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "gone", "."):
        with pytest.raises(UserError, match="is there and is no result"):
            check_out(tmp_path / name)
    with pytest.raises(UserError, match="--out: cannot write '.*notes.md/out.json': "):
        check_out(tmp_path / "notes.md" / "out.json")


def test_an_earlier_result_and_a_new_file_may_be_written(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps({"made_with": {}, "tables": []}))
    (tmp_path / "trace.json").write_text('{\n  "schemaVersion": 1,\n "traceEvents": []}')
    check_out(tmp_path / "bench.json")
    check_out(tmp_path / "new" / "bench.json")
    check_trace(tmp_path / "trace.json")
    check_trace(None)
    assert not list((tmp_path / "new").iterdir())


def test_a_temporary_folder_that_is_named_and_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where an earlier answer is kept
    with scratch_folder() as scratch:
        assert scratch.parent == tmp_path
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(UserError, match="^TMPDIR: cannot write '.*nowhere'; name a folder that can be written$"):
        with scratch_folder():
            pass

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="^TMPDIR: No usable temporary .*; name a folder that can be written$"):
        with scratch_folder():
            pass


def test_a_scratch_folder_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--folder: cannot write '.*nowhere': No such file.*; name another folder"):
        with scratch_folder(tmp_path / "nowhere", "--folder"):
            pass


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"variants": 5},
        {"variants": {"mmtard": {"phases": []}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS | {"attack": "x"}], "flops_by_phase": FLOPS}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS]}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS], "flops_by_phase": 5}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS], "flops_by_phase": FLOPS | {"attack": "1"}}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS | {"attack": -1}], "flops_by_phase": FLOPS}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [{"attack": 1}], "flops_by_phase": FLOPS}}, "config": CONFIG},
        {"variants": {"mmtard": {"phases": [SECONDS], "flops_by_phase": FLOPS}}, "config": CONFIG, "world_size": 0},
    ],
)  # fmt: skip
def test_a_damaged_train_file_is_one_line(tmp_path, content):
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="train.json' holds no .*bench train"):
        measured(Machine(), tmp_path / "train.json", None)


@pytest.mark.parametrize("rates", [[], "fast", ["a"], [0], [-1], [None], {"a": 1}, 5])
def test_a_damaged_data_file_is_one_line(tmp_path, rates):
    (tmp_path / "data.json").write_text(json.dumps({"core": {"as stored": {"images_per_cpu_s": rates}}}))
    with pytest.raises(UserError, match="--data: '.*data.json' holds no rate .*run mmtard bench data again"):
        measured(Machine(), None, tmp_path / "data.json")


def test_a_pipe_in_place_of_a_measurement_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.json")
    with pytest.raises(UserError, match="cannot be read"):
        measured(Machine(), None, tmp_path / "data.json")
