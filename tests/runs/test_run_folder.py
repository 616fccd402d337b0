import errno
import json
import platform
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from mmtard import config
from mmtard.errors import RunError, UserError
from mmtard.runs import folder, lock
from mmtard.runs.checkpoint_writer import Checkpoints

FINGERPRINT = "a1b2"


@pytest.fixture
def prepare(tree, write, ranks):
    """Call with overrides (and another data fingerprint): the prepared folder of that run, in a group of one."""
    path = write(tree)

    def call(*overrides, fingerprint=FINGERPRINT):
        return folder.prepare(config.load(path, list(overrides)), fingerprint, ranks)

    return call


@pytest.fixture
def run(prepare, tmp_path):
    """The folder of a run that was started and has checkpoints of steps 3 and 6."""
    prepare()
    saver = Checkpoints(tmp_path / "run", keep_last=5)
    for step in (3, 6):
        saver.save(step, {"w": torch.ones(2)}, {}, {"step": step, "data_fingerprint": FINGERPRINT})
        saver.wait()
    return tmp_path / "run"


def history(run):
    return [json.loads(line) for line in (run / "resume.jsonl").read_text().splitlines()]


def test_a_new_run_starts_at_zero_and_writes_what_it_decided(prepare, tree, write, tmp_path):
    found = prepare("train.lr=1e-3")
    assert (found.path, found.checkpoint, found.state, found.step) == (tmp_path / "run", None, {}, 0)
    stored = yaml.safe_load((found.path / "config.yaml").read_text())
    assert stored["train"]["lr"] == 1e-3 and stored["attack"]["steps"] == 10  # defaults too
    (start,) = history(found.path)
    expected = {"step": 0, "checkpoint": None, "world_size": 1, "passed_over": [], "changed": {}}
    assert start.items() >= expected.items()
    assert {p.name for p in found.path.iterdir()} == {
        "config.yaml",
        "environment.json",
        "resume.jsonl",
        "checksums.json",
        ".lock",
    }


def test_environment_names_versions_commit_and_hosts(prepare, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmtard", "train", "a run.yaml"])
    about = json.loads((prepare().path / "environment.json").read_text())
    assert about["python"] == platform.python_version()
    assert about["versions"]["torch"] == version("torch") and about["versions"]["open_clip_torch"] == version(
        "open_clip_torch"
    )
    assert None not in about["versions"].values() and about["command"] == "mmtard train 'a run.yaml'"
    (host,) = about["hosts"]
    assert host.startswith(f"{socket.gethostname()} rank 0 cpu")
    root = Path(folder.__file__).parents[2]
    if (root / ".git").exists():
        asked = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        assert about["git"]["commit"] == asked


def test_an_unchanged_run_goes_on_from_its_newest_checkpoint(prepare, run):
    found = prepare()
    assert (found.checkpoint, found.step) == (run / "checkpoints" / "step-6", 6)
    assert [(line["step"], line["checkpoint"]) for line in history(run)] == [(0, None), (6, "step-6")]


def test_a_run_past_its_bounds_is_refused_and_nothing_is_written(prepare, run):
    for _ in range(3):
        prepare()  # and was killed
    before = (run / "resume.jsonl").read_bytes()
    with pytest.raises(RunError, match="the last 3 starts began at step 6 and left no newer checkpoint") as error:
        prepare()
    assert error.value.status == 1 and (run / "resume.jsonl").read_bytes() == before
    assert prepare("resume.max_starts_without_progress=4").step == 6


def test_a_start_that_waits_for_another_says_so(prepare, run, monkeypatch, capsys):
    monkeypatch.setattr(lock, "QUIET_S", 0.0)
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 1.2)
    path = str(run / ".lock")
    code = f"import fcntl; f = open({path!r}, 'rb+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
    code += "f.write(b'node7 process 3 \\xff'); f.flush(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="is in use by node7 process 3 \ufffd; wait for it to end"):
            prepare()
    finally:
        other.communicate("\n")
    said = capsys.readouterr().err
    assert said == f"mmtard: run_dir: '{run}' is in use by node7 process 3 \ufffd; waiting up to 1 s for its end\n"


def test_a_folder_that_another_process_works_in_is_refused(prepare, run, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 0.0)
    code = f"import fcntl; f = open({str(run / '.lock')!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
    code += "f.write('node7 process 3'); f.flush(); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(
            UserError, match="is in use by node7 process 3; wait for it to end, end it, or choose another folder"
        ):
            prepare()
    finally:
        other.communicate("\n")
    assert prepare().step == 6


def test_what_was_passed_over_is_recorded(prepare, run):
    (run / "checkpoints" / "step-6" / "state.json").unlink()
    folder = prepare()
    assert folder.step == 3 and folder.passed_over == ["step-6: state.json is missing"]
    assert (
        history(run)[-1]["passed_over"] == ["step-6: state.json is missing"]
        and history(run)[-1]["checkpoint"] == "step-3"
    )


def test_a_run_without_a_whole_checkpoint_is_not_started_over(prepare, run):
    for step in (3, 6):
        (run / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    words = (
        r"none is whole \(step-6: no manifest.json; step-3: no manifest.json\); remove '.*checkpoints' to start over"
    )
    with pytest.raises(UserError, match=words):
        prepare()


def test_a_changed_configuration_is_refused_with_every_key_and_nothing_is_written(prepare, run):
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(UserError) as error:
        prepare("train.lr=1e-3", "attack.eps=4/255")
    message = str(error.value)
    assert "attack.eps: '2/255' -> '4/255'; train.lr: 2e-05 -> 0.001" in message
    assert "restore them, list the keys in resume.allow, or choose another run_dir" in message
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("allow", ["train.lr", "train"])
def test_resume_allow_takes_a_key_or_a_section(prepare, run, allow):
    assert prepare("train.lr=1e-3", f"resume.allow=[{allow}]").step == 6
    assert history(run)[-1]["changed"] == {"train.lr": [2e-5, 1e-3]}
    assert config.load(run / "config.yaml").train.lr == 1e-3  # and is what the next start is compared with
    assert prepare("train.lr=1e-3").step == 6


@pytest.mark.parametrize("allow", ["train.l", "tra", "train.lr.x", "attack"])
def test_resume_allow_takes_no_part_of_a_name(prepare, run, allow):
    with pytest.raises(UserError, match="train.lr: 2e-05 -> 0.001"):
        prepare("train.lr=1e-3", f"resume.allow=[{allow}]")


def test_settings_that_do_not_change_the_result_may_change(prepare, run):
    assert prepare("log.every=1", "log.tensorboard=false").step == 6


def test_other_data_under_the_same_name_is_refused_unless_allowed(prepare, run):
    with pytest.raises(UserError, match="data.fingerprint: 'a1b2' -> 'c3d4'"):
        prepare(fingerprint="c3d4")
    assert prepare("resume.allow=[data.fingerprint]", fingerprint="c3d4").step == 6


@pytest.fixture
def start_with(prepare, tmp_path):
    """Call with the hash of the clean teacher and overrides: a start of a run trained with the clean teacher "old"."""
    prepare()
    saver = Checkpoints(tmp_path / "run", keep_last=5)
    state = {"step": 3, "data_fingerprint": FINGERPRINT, "teachers_sha256": {"clean": "old", "robust": "r"}}
    saver.save(3, {"w": torch.ones(2)}, {}, state)
    saver.wait()

    def call(sha256, *overrides):
        found = {"clean": sha256, "robust": "r", "third": "t"}
        settings = config.load(tmp_path / "run" / "config.yaml", list(overrides))
        folder.note_teachers(prepare(*overrides), settings, found)
        return history(tmp_path / "run")[-1]

    return call


def test_the_hashes_of_teachers_are_recorded_and_other_weights_refused(start_with):
    start = start_with("old")
    assert start["teachers_sha256"] == {"clean": "old", "robust": "r", "third": "t"} and start["changed"] == {}
    with pytest.raises(
        UserError, match=r"\(teachers.clean.sha256: old -> new\); .*resume.allow=\[teachers.clean.sha256\]"
    ):
        start_with("new")


@pytest.mark.parametrize("allow", ["teachers.clean.sha256", "teachers.clean", "teachers", "teachers.clean.weights"])
def test_resume_allow_takes_other_weights_of_a_teacher(start_with, allow):
    assert start_with("new", f"resume.allow=[{allow}]")["changed"] == {"teachers.clean.sha256": ["old", "new"]}


def test_a_teacher_of_other_weights_by_its_setting_is_allowed_with_it(start_with):
    start = start_with("new", "teachers.clean.weights=else.pt", "resume.allow=[teachers.clean.weights]")
    assert start["changed"].keys() == {"teachers.clean.weights", "teachers.clean.sha256"}


@pytest.mark.parametrize("allow", ["teachers.clean.placement", "teachers.robust", "seed", "train"])
def test_what_else_is_allowed_takes_no_other_weights(start_with, allow):
    with pytest.raises(UserError, match="teachers.clean.sha256: old -> new"):
        start_with("new", f"resume.allow=[{allow}]")


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_teachers_that_are_there(prepare, run, write, tree):
    folder.note_teachers(prepare(), config.load(write(tree)), {"clean": "new", "robust": "r"})
    assert history(run)[-1]["teachers_sha256"]["clean"] == "new" and history(run)[-1]["changed"] == {}


def test_a_run_that_never_reached_a_checkpoint_may_change(prepare):
    prepare()
    found = prepare("train.lr=1e-3", fingerprint="c3d4")
    assert found.step == 0 and config.load(found.path / "config.yaml").train.lr == 1e-3


def test_a_run_dir_that_cannot_be_written(prepare, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run_dir: cannot write to '.*file/run': .*; choose another folder"):
        prepare(f"run_dir={tmp_path / 'file' / 'run'}")


MINE = {
    "config.yaml": "# my notes\n",
    "metrics.jsonl": "not json\n",
    "environment.json": "{}",
    "start/precious.txt": "x",
}


@pytest.mark.parametrize("name", [*MINE, "checkpoints/mine.pt", "class_embeddings.safetensors", "resume.jsonl"])
def test_a_folder_with_files_of_the_users_own_is_refused_and_left_as_it_is(prepare, tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text(MINE.get(name, "mine"))
    words = f"is no run's folder, and holds {name.split('/')[0]}, which a run would replace; move what is yours"
    with pytest.raises(UserError, match=words):
        prepare()
    assert mine.read_text() == MINE.get(name, "mine")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {name.split("/")[0]}


def test_a_folder_with_other_files_may_become_a_runs(prepare, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    assert prepare().step == 0 and (tmp_path / "run" / "README.md").read_text() == "mine"


def test_a_start_that_was_killed_early_left_a_folder_that_is_a_runs(prepare, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.jsonl").touch()  # the first thing a start writes
    (tmp_path / "run" / "config.yaml").write_text("half")
    (tmp_path / "run" / ".config.yaml.77-abcd.part").write_text("ha")
    prepare()
    assert not list((tmp_path / "run").glob(".*.part"))


def test_a_run_that_lost_its_history_goes_on_from_its_checkpoint(prepare, run):
    (run / "resume.jsonl").unlink()
    assert prepare().step == 6


@pytest.mark.parametrize("spoil", [lambda text: "# why this lr\n" + text, lambda text: text[:40]])
def test_settings_that_were_changed_or_damaged_in_the_folder_are_not_overwritten(prepare, run, spoil):
    path = run / "config.yaml"
    changed = spoil(path.read_text())
    path.write_text(changed)
    with pytest.raises(
        UserError, match=r"config.yaml' does not match its checksum .*; put it back .*, or move it away"
    ):
        prepare()
    assert path.read_text() == changed
    path.unlink()
    assert prepare().step == 6


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", ".lock", ".heartbeat", "start", "checksums.json"])
@pytest.mark.parametrize("there", [True, False])
def test_no_link_in_a_runs_folder_is_followed(prepare, run, tmp_path, name, there):
    victim = tmp_path / "victim"
    if there:
        victim.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"{name}' is a link, and a run writes through none"):
        prepare()
    assert victim.exists() == there and (not there or victim.read_text() == "mine")


def test_a_scratch_file_that_is_a_link_is_not_followed(prepare, run, tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("config.yaml.tmp", ".writable", ".resume.jsonl.part"):
        (run / name).symlink_to(tmp_path / "victim")
    assert prepare().step == 6 and (tmp_path / "victim").read_text() == "mine"


def test_checkpoints_may_be_a_link_to_another_disk(prepare, run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert prepare().step == 6


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', "\0\0"])
def test_damaged_checksums_are_one_line_with_the_remedy(prepare, run, content):
    (run / "checksums.json").write_text(content)
    with pytest.raises(UserError, match=r"checksums.json' is damaged; remove it to go on"):
        prepare()
    (run / "checksums.json").unlink()
    assert prepare().step == 6


def test_a_lock_that_is_a_folder_is_one_line(prepare, run):
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(UserError, match=r"run_dir: '.*\.lock' cannot be opened: Is a directory; remove it"):
        prepare()


def test_a_full_disk_at_the_start_is_one_line(prepare, run, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_text", full)
    with pytest.raises(
        UserError, match=r"cannot write '.*run': No space left on device \(the disk at '.*' has .* free\)"
    ):
        prepare()


def test_starts_of_one_moment_do_not_stumble_over_each_other(tmp_path):
    """Each tries whether the folder can be written to before it waits for the run's lock."""
    with ThreadPoolExecutor(8) as pool:
        for made in [pool.submit(folder._make, tmp_path / "run") for _ in range(800)]:
            made.result()
    assert list((tmp_path / "run").iterdir()) == []
