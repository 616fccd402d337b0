import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from published_checkpoints import publish

from mmtard.errors import UserError
from mmtard.files import sealed, why_not_read
from mmtard.runs import history, survey, table


@pytest.fixture
def run(tree, tmp_path, monkeypatch):
    """Call with a name and the ends of its starts: that run's folder under `all`, seven steps of ten done."""
    monkeypatch.setenv("PATH", "")  # no Slurm answers

    def make(name, *kinds, resume=None):
        folder = tmp_path / "all" / name
        publish(folder, 6)
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
    return {row.run.name: row.state for row in survey.find_runs(folder)}


def test_a_run_whose_metrics_are_gone_has_done_what_it_saved(run, tmp_path):
    (run("a", history.PREEMPTED) / "metrics.jsonl").unlink()
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.step, row.checkpoint) == (6, 6)


@pytest.mark.parametrize(
    "kept, after, lost",
    [
        (3, b"", 0),
        (2, b"\0" * 300, 1),
        (2, b'garbage\n{"step": 7}\n[]\n', 3),
        (0, b"x\n" * 5, 5),
        (3, b'{"step": 8, "sec', 0),
    ],
)
def test_a_run_has_done_what_it_saved_and_lines_of_its_metrics_that_are_no_rows_are_told(
    run, tmp_path, kept, after, lost
):
    path = run("a", history.COMPLETE) / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]) + after)
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.step, row.checkpoint) == (6, 6)
    told = f"metrics.jsonl is damaged in {lost} of the {kept + lost} lines read, which are left out here"
    assert row.damaged == ((told,) if lost else ())


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda step: step.symlink_to("gone"), "no manifest.json"),
        (lambda step: step.symlink_to("step-9"), "unreadable manifest.json ([Errno 40]"),
        (lambda step: step.mkdir(), "no manifest.json"),
        (lambda step: step.touch(), "unreadable manifest.json ([Errno 20]"),
    ],
)
def test_a_checkpoint_that_is_not_whole_hides_nothing_and_is_told(run, tmp_path, spoil, words):
    spoil(run("a", history.COMPLETE) / "checkpoints" / "step-9")
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.state, row.step, row.checkpoint) == ("complete", 7, 6)
    (told,) = row.damaged
    assert told.startswith(f"checkpoints/step-9: {words}")


@pytest.mark.parametrize("content", ["newer: 1\n", "a: [", b"\xff\xfe", None])
@pytest.mark.parametrize("kind, in_slurm, state", [(None, "RUNNING", "running"), (history.FAILED, "", "failed: why 0")])
def test_settings_that_cannot_be_used_are_named_and_hide_nothing_but_the_number_of_steps(
    run, tmp_path, monkeypatch, content, kind, in_slurm, state
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    path = run("a", kind) / "config.yaml"
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(survey.slurm, "states", lambda jobs: {"12": in_slurm})
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.state, row.step, row.steps, row.checkpoint) == (state, 7, None, 6)
    assert len(row.damaged) == 1 and row.damaged[0].startswith("config.yaml cannot be used: ")


def test_a_damaged_line_of_the_history_is_told_and_brings_no_old_note_back(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    folder = run("a", history.PREEMPTED, None)
    (folder / "unnoted.jsonl").write_text('{"time": "2001-01-01T00:00:00+0000", "job": "7", "after": 1}\n')
    lines = (folder / "resume.jsonl").read_text()
    (folder / "resume.jsonl").write_text("garbled" + lines)
    monkeypatch.setattr(survey.slurm, "states", lambda jobs: dict.fromkeys(jobs & {"12"}, "RUNNING"))
    (row,) = survey.find_runs(tmp_path / "all")
    assert row.state == "running"
    assert row.damaged == ("resume.jsonl is damaged in 1 of the 2 lines read, which are left out here",)


@pytest.mark.parametrize("start", [{"step": 10**400}, {"step": -1}, {"step": True}])
def test_a_start_at_a_step_that_no_run_reaches_is_none(run, tmp_path, start, capsys):
    folder = run("a", history.PREEMPTED)
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints" / f"step-{'9' * 50}").mkdir()
    with (folder / "resume.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.state, row.step, row.checkpoint, row.restarts) == ("stopped: why 0", 6, 6, 0)
    table.show(tmp_path / "all")
    assert "6/10" in capsys.readouterr().out


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
    code = f"import fcntl; f = open({str(folder / '.lock')!r}, 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print(1, flush=True); input()"
    held = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "1\n"
        (row,) = survey.find_runs(tmp_path / "all")
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
    assert "a: 41.2 % under linf 2/255 (quick-val)" in printed and "7/10" in printed and "6 (0s ago)" in printed
    assert "a: evaluations/other/results.json cannot be read" in printed


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match="no run below '.*'; give the folder that holds your run_dirs"):
        table.show(tmp_path)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_folder_that_is_not_there(tmp_path, as_json):
    with pytest.raises(UserError, match="'.*/rnus' is no folder; give the one that holds your run_dirs"):
        table.show(tmp_path / "rnus", as_json)


def test_the_table_fits_80_columns_and_says_below_it_why_a_run_ended(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run("vitb32_mmtard_confidence_sigmoid_eps4", history.FAILED)
    run("b", history.COMPLETE)
    table.show(tmp_path / "all")
    shown = capsys.readouterr().out.splitlines()
    notes = [line for line in shown if line.startswith("vitb32_mmtard_confidence_sigmoid_eps4: ")]
    assert notes == ["vitb32_mmtard_confidence_sigmoid_eps4: failed: why 0"]
    assert max(len(line) for line in shown if line not in notes) <= 80
    assert all(word in shown[1] + shown[0] for word in table.COLUMNS)


GLOO = "lost: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"


def test_names_and_reasons_of_others_are_shown_as_they_stand(run, tmp_path, capsys):
    folder = run("x[red]y", None)
    history.record_end(folder, history.LOST, GLOO + "\x1b[2J", 1)
    run("z[/b]", history.COMPLETE)
    table.show(tmp_path / "all")
    shown = capsys.readouterr().out
    assert f"x[red]y: stopped: {GLOO}?[2J\n" in shown and "z[/b]" in shown


def test_a_long_reason_is_shortened_in_the_table_alone(run, tmp_path, capsys):
    folder = run("a", None)
    reason = (
        "cannot download 'hf-hub:a/b':\n" + "the server did not answer, " * 20 + "look at HF_HUB_OFFLINE and try again"
    )
    history.record_end(folder, history.FAILED, reason, 1)
    table.show(tmp_path / "all")
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("a: failed: "))
    assert len(note) <= len("a: failed: ") + 160, "it fills the console"
    assert "a: failed: cannot download 'hf-hub:a/b': the server" in note and " ... (whole in resume.jsonl) ... " in note
    assert note.endswith("look at HF_HUB_OFFLINE and try again")
    table.show(tmp_path / "all", as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["state"] == f"failed: {reason}"
    assert history.read(folder)[-1]["end"]["reason"] == reason


BAD = {
    "config.yaml is no YAML": (lambda run: (run / "config.yaml").write_text("a: ["), "complete"),
    "config.yaml is gone": (lambda run: (run / "config.yaml").unlink(), "complete"),
    "the history is no history": (lambda run: (run / "resume.jsonl").write_text("my notes"), "unreadable"),
    "the history was emptied": (lambda run: (run / "resume.jsonl").write_text(""), "unreadable"),
    "an end of another shape": (
        lambda run: (run / "resume.jsonl").write_text('{"step": 1, "end": {"kind": [], "reason": 3}}\n'),
        "stopped: 3",
    ),
    "metrics are no rows": (lambda run: (run / "metrics.jsonl").write_text('1\n{"step": "x"}\n[]\n'), "complete"),
    "metrics are a folder": (
        lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
        "complete",
    ),
}


def test_a_run_whose_ranks_a_signal_ended_as_they_started_is_a_row(run, tmp_path, monkeypatch):
    folders = tmp_path / "all" / "new", run("old", history.PREEMPTED)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for folder in folders:
        assert history.why_not_restart_signalled(folder, 3) is None
    ended = "stopped: ended by a signal before its folder was prepared, once"
    assert states(tmp_path / "all") == {"new": ended, "old": ended}
    for in_slurm, shown in (("PENDING", "queued"), ("RUNNING", "running"), ("COMPLETED", ended)):
        monkeypatch.setattr(survey.slurm, "states", lambda jobs: dict.fromkeys(jobs, in_slurm))
        assert states(tmp_path / "all") == {"new": shown, "old": shown}


@pytest.fixture
def ended_early(monkeypatch):
    """Call with a run's folder: a signal ends a start of job 7 there before it comes into the history."""

    def end(folder, most=3):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return history.why_not_restart_signalled(folder, most)

    return end


GONE, NO_START = "unreadable: resume.jsonl is gone", "unreadable: resume.jsonl holds no start of a run"


@pytest.mark.parametrize("lost, state", [(None, GONE), ("gar\0bage\n", NO_START), ("", NO_START)])
@pytest.mark.parametrize("in_slurm", [None, "PENDING"])
def test_a_note_from_before_the_first_start_hides_no_lost_history(
    run, ended_early, tmp_path, monkeypatch, lost, state, in_slurm
):
    ended_early(tmp_path / "all" / "a")
    history_file = run("a", history.PREEMPTED) / "resume.jsonl"
    history_file.unlink() if lost is None else history_file.write_text(lost)
    monkeypatch.setattr(survey.slurm, "states", lambda jobs: dict.fromkeys(jobs, in_slurm) if in_slurm else {})
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.state, row.step, row.checkpoint) == (state, 7, 6)


def test_a_start_that_was_killed_before_it_came_into_the_history_is_no_damage(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "resume.jsonl").touch()
    assert states(tmp_path) == {"a": "stopped: killed before it began"}


@pytest.mark.parametrize(
    "kinds, bounds",
    [
        ([history.PREEMPTED], {}),
        ([history.FAILED], {}),
        ([history.STOPPED], {}),
        ([history.LOST] * 2, {"max_losses": 1}),
    ],
)
def test_a_start_that_a_signal_ended_early_is_newer_than_why_the_one_before_it_ended(
    run, ended_early, tmp_path, kinds, bounds
):
    folder = run("a", *kinds, resume=bounds)
    ended = "stopped: ended by a signal before its folder was prepared"
    assert ended_early(folder, most=2) is None
    assert states(tmp_path / "all") == {"a": f"{ended}, once"}
    assert ended_early(folder, most=2) is not None
    assert states(tmp_path / "all") == {"a": f"{ended}, 2 times, and it was not started again"}


@pytest.mark.parametrize("name", ["unnoted.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(
    "kind, in_slurm, state", [(None, "RUNNING", "running"), (history.FAILED, None, "failed: why 0")]
)
def test_a_note_or_metrics_that_cannot_be_read_are_named_and_hide_nothing_else(
    run, tmp_path, monkeypatch, name, kind, in_slurm, state
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    folder = run("a", kind)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    monkeypatch.setattr(survey.slurm, "states", lambda jobs: {"12": in_slurm} if jobs == {"12"} and in_slurm else {})
    (row,) = survey.find_runs(tmp_path / "all")
    step = 7 if name == "unnoted.jsonl" else 6  # the saved one where no metrics tell of another
    assert (row.state, row.step, row.steps, row.checkpoint) == (state, step, 10, 6)
    assert row.damaged == (f"'{folder / name}' cannot be read: Is a directory; move it away",)


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; correct its permissions"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), "Too many levels of symbolic links; move it away"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_cannot_be_read_says_what_to_do_where_that_is_known(error, words):
    assert why_not_read("a", error) == f"'a' cannot be read: {words}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"time": "2026-1',
        b"\0" * 500,
        b"\xff\xfe\x80",
        b'[1]\n"x"\nnull\n',
        b'{"job": "7"}\n',
        b'{"after": "0"}\n',
        b'{"after": false}\n',
        None,
    ],
)
def test_a_note_alone_that_holds_no_start_is_what_is_named(tmp_path, content):
    path = tmp_path / "a" / "unnoted.jsonl"
    path.parent.mkdir()
    path.symlink_to("gone") if content is None else path.write_bytes(content)
    assert states(tmp_path) == {"a": "unreadable: unnoted.jsonl holds no start that can be read"}


def test_a_note_of_a_start_after_others_tells_that_their_history_is_gone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "unnoted.jsonl").write_text('{"job": "7", "after": 2}\n')
    assert states(tmp_path) == {"a": GONE}


@pytest.mark.parametrize("name", ["resume.jsonl", "unnoted.jsonl"])
def test_a_folder_in_the_place_of_a_runs_history_is_a_row(tmp_path, name):
    path = tmp_path / "a" / name
    path.mkdir(parents=True)
    assert states(tmp_path) == {"a": f"unreadable: '{path}' cannot be read: Is a directory; move it away"}


def test_starts_that_signals_ended_early_count_as_starts(run, ended_early, tmp_path):
    for _ in range(3):
        ended_early(tmp_path / "all" / "a")
    (row,) = survey.find_runs(tmp_path / "all")
    assert row.restarts == 2
    run("a", None)
    (row,) = survey.find_runs(tmp_path / "all")
    assert row.restarts == 3


def test_only_true_marks_a_start_as_the_last(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "unnoted.jsonl").write_text('{"after": 0, "refused": "no"}\n')
    assert states(tmp_path) == {"a": "stopped: ended by a signal before its folder was prepared, once"}


@pytest.mark.parametrize("name", ["checkpoints", "evaluations"])
def test_a_folder_of_a_run_that_cannot_be_listed_is_named(run, tmp_path, name):
    folder = run("a", history.COMPLETE)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).touch()
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.state, row.step) == ("complete", 7)
    assert row.damaged == (f"'{folder / name}' cannot be read: Not a directory; move it away",)


@pytest.mark.parametrize(
    "row", [{"step": 10**400, "seconds": 1}, {"step": 8, "seconds": 10**400}, {"step": -1, "seconds": 1}]
)
def test_numbers_that_no_run_reaches_are_no_row_of_metrics(run, tmp_path, row):
    with (run("a", history.COMPLETE) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    (shown,) = survey.find_runs(tmp_path / "all")
    assert (shown.state, shown.step, shown.images_per_s) == ("complete", 7, 4.0)


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_run_is_a_row_of_its_own_and_hides_no_other(run, tmp_path, what, capsys):
    spoil, state = BAD[what]
    spoil(run("bad", history.COMPLETE))
    run("good", history.COMPLETE)
    shown = states(tmp_path / "all")
    assert shown["good"] == "complete" and shown["bad"].startswith(state), shown
    table.show(tmp_path / "all")
    assert "bad" in capsys.readouterr().out


def test_programs_read_the_table_as_json(run, tmp_path, command, capsys):
    folder = run("a", history.PREEMPTED)
    assert command("runs", tmp_path / "all", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["run"], shown["state"], shown["step"], shown["steps"]) == (str(folder), "stopped: why 0", 7, 10)
    assert shown["images_per_s"] == 4.0 and shown["robust"] is None


def test_a_watched_table_is_printed_anew_until_ctrl_c(run, tmp_path, command, capsys, monkeypatch):
    run("a", history.COMPLETE)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(table.time, "sleep", sleep)
    assert command("runs", tmp_path / "all", "--watch", "7", "--json") == 0
    assert waited == [7, 7, 7] and len(capsys.readouterr().out.splitlines()) == 3


def test_a_pipe_in_a_run_or_a_time_without_end_hides_no_other_run(run, tmp_path):
    os.mkfifo(run("piped", history.COMPLETE) / "evaluations")
    endless = run("endless", history.COMPLETE)
    (endless / "metrics.jsonl").write_text('{"step": 3, "seconds": 1e308}\n' * 3 + '{"step": 7, "seconds": Infinity}\n')
    (run("whole", history.COMPLETE) / "checkpoints" / "step-007").mkdir()
    piped = tmp_path / "all" / "piped" / "evaluations"
    assert states(tmp_path / "all") == {
        "piped": f"unreadable: '{piped}' is a pipe or a device, which no file here may be; remove it",
        "endless": "complete",
        "whole": "complete",
    }
    table.show(tmp_path / "all")


def test_steps_that_took_no_time_have_no_speed(run, tmp_path):
    (run("a", history.COMPLETE) / "metrics.jsonl").write_text('{"step": 7, "seconds": 1e-320}\n')
    (row,) = survey.find_runs(tmp_path / "all")
    assert (row.step, row.images_per_s, row.damaged) == (7, None, ())


@pytest.mark.parametrize("mean", [{"robust": 10**400}, {"robust": float("nan")}, {"robust": 7}, {"robust": -0.1}])
def test_a_robust_accuracy_that_is_no_share_is_named_and_not_shown(run, tmp_path, mean):
    results = {"settings": {"norm": "linf"}, "averages": {"all": {"eps": {"2/255": mean}}}}
    folder = run("a", history.COMPLETE) / "evaluations" / "quick"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (row,) = survey.find_runs(tmp_path / "all")
    told = "is damaged: its robust accuracy is no share; remove it, and evaluate the model again"
    assert (row.state, row.robust, row.damaged) == ("complete", None, (f"evaluations/quick/results.json {told}",))


def test_an_evaluation_whose_number_was_changed_is_named_and_not_shown(run, tmp_path):
    results = {"settings": {"norm": "linf"}, "averages": {"all": {"eps": {"2/255": {"robust": 0.5}}}}}
    folder = run("a", history.COMPLETE) / "evaluations" / "quick"
    folder.mkdir(parents=True)
    whole = json.dumps(sealed(results))
    (folder / "results.json").write_text(whole)
    assert survey.find_runs(tmp_path / "all")[0].robust == "50.0 % under linf 2/255 (quick)"
    (folder / "results.json").write_text(whole.replace("0.5", "0.9"))
    (row,) = survey.find_runs(tmp_path / "all")
    damaged = "evaluations/quick/results.json is damaged: its content does not fit its digest"
    assert row.robust is None and row.damaged == (damaged,)
