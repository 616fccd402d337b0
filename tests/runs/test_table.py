import json
import os
import subprocess
import sys

import pytest
import yaml

from mmtard.errors import UserError
from mmtard.runs import history, table


@pytest.fixture
def run(tree, tmp_path, monkeypatch):
    """Call with a name and the ends of its starts: that run's folder under `all`, seven steps of ten done."""
    monkeypatch.setenv("PATH", "")  # no Slurm answers

    def make(name, *kinds, resume=None):
        folder = tmp_path / "all" / name
        (folder / "checkpoints" / "step-6").mkdir(parents=True)
        (folder / "checkpoints" / "latest").symlink_to("step-6")
        (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "run_dir": str(folder), "resume": resume or {}}))
        rows = [{"step": n, "seconds": 2.0, "images_per_s": 4.0} for n in range(1, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for i, kind in enumerate(kinds):
            history.record_start(folder, {"step": 2 * i})
            if kind:
                history.record_end(folder, kind, f"why {i}", 2 * i + 1)
        return folder

    return make


def states(folder):
    return {row.run.name: row.state for row in table.find_runs(folder)}


def test_the_state_of_a_run_comes_from_its_history(run, tmp_path):
    run("a", history.PREEMPTED, history.COMPLETE)
    run("b", history.PREEMPTED)
    run("c", history.FAILED)
    run("d", None)
    run("deep/e", history.TIMEOUT, resume={"max_timeouts": 0})
    assert states(tmp_path / "all") == {
        "a": "complete",
        "b": "stopped: why 0",
        "c": "failed: why 0",
        "d": "stopped: ended without a word: killed, or its node lost",
        "e": "failed: 1 starts ended as timeout, the last with: why 0; resume.max_timeouts allows 0, raise it to go on",
    }


def test_a_run_in_use_is_running_and_says_how_long_it_will_be(run, tmp_path):
    folder = run("a", history.PREEMPTED, None)
    held = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f = open({str(folder / '.lock')!r}, 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "1\n"
        (row,) = table.find_runs(tmp_path / "all")
    finally:
        held.communicate("\n")
    assert (row.state, row.step, row.steps, row.restarts, row.checkpoint) == ("running", 7, 10, 1, 6)
    assert (row.images_per_s, row.seconds_left) == (4.0, 6.0)  # batches of 8 in 2 s, three steps to go
    assert states(tmp_path / "all") == {"a": "stopped: ended without a word: killed, or its node lost"}


@pytest.mark.parametrize(
    "kind, answer, state",
    [
        (history.PREEMPTED, "PENDING", "queued"),
        (None, "RUNNING", "running"),
        (None, "SIGNALING", "running"),
        (history.COMPLETE, "PENDING", "complete"),
        (history.PREEMPTED, "COMPLETED", "stopped: why 0"),
    ],
)
def test_slurm_is_asked_about_the_job_of_the_newest_start(run, tmp_path, monkeypatch, kind, answer, state):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run("a", kind)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '11 PENDING\\n12 {answer}\\n'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(tmp_path / "all") == {"a": state}


@pytest.mark.parametrize(
    "answer, state", [("PENDING", "queued"), ("RUNNING", "running"), ("CANCELLED", "stopped: why 0")]
)
def test_a_job_that_goes_on_for_one_that_may_not_be_requeued_is_asked_for_in_its_place(
    run, tmp_path, monkeypatch, answer, state
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    folder = run("a", history.PREEMPTED)
    history.record_successor("12", "13", str(folder / "config.yaml"))
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '12 FAILED\\n13 {answer}\\n14 PENDING\\n'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(tmp_path / "all") == {"a": state}
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    history.record_start(folder, {"step": 6})
    assert states(tmp_path / "all") == {"a": "queued"}


def test_the_newest_evaluation_is_shown(run, tmp_path, capsys):
    folder = run("a", history.COMPLETE)
    (folder / "evaluations").mkdir()
    for name, robust, age in (("old", 0.1, 100), ("quick-val", 0.4125, 10), ("other", None, 0)):
        path = folder / "evaluations" / name / "results.json"
        path.parent.mkdir()
        averages = {"all": {"eps": {"2/255": {"robust": robust}, "4/255": {"robust": 0.0}}}}
        path.write_text(json.dumps({"averages": averages, "settings": {"norm": "linf"}} if robust else {"format": 0}))
        os.utime(path, (1e9 - age, 1e9 - age))
    table.show(tmp_path / "all")
    printed = capsys.readouterr().out
    assert "41.2 % under linf 2/255 (quick-val)" in printed and "7/10" in printed and "step 6, " in printed


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match="no run below '.*'; give the folder that holds your run_dirs"):
        table.show(tmp_path)
