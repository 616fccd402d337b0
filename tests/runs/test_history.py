import errno
import json
import time

import pytest

from mmtard.config import Resume
from mmtard.distributed import slurm
from mmtard.errors import UserError
from mmtard.files import writing
from mmtard.runs import history
from mmtard.runs.history import COMPLETE, FAILED, LOST, PREEMPTED, STOPPED, TIMEOUT


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_JOB_END_TIME",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path):
    """Call with (step, kind of end or None) for each start: the run folder with that history."""

    def make(*starts):
        for step, kind in starts:
            history.record_start(tmp_path, {"step": step})
            if kind:
                history.record_end(tmp_path, kind, f"why {step}", step)
        return tmp_path

    return make


def test_a_start_and_its_end_are_one_line(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    folder = run((0, PREEMPTED), (4, None))
    first, second = (json.loads(line) for line in (folder / "resume.jsonl").read_text().splitlines())
    assert (first["step"], first["job"], first["restart"]) == (0, "7", 2)
    assert {k: first["end"][k] for k in ("kind", "reason", "step")} == {"kind": PREEMPTED, "reason": "why 0", "step": 0}
    assert (
        "end" not in second
        and history.end_kind(second) == LOST
        and "killed, or its node lost" in history.end_reason(second)
    )
    assert [p.name for p in folder.iterdir()] == ["resume.jsonl"]


@pytest.mark.parametrize(
    "first, then, stays",
    [
        (TIMEOUT, FAILED, TIMEOUT),
        (LOST, FAILED, FAILED),
        (LOST, STOPPED, STOPPED),
        (FAILED, LOST, FAILED),
        (LOST, LOST, LOST),
    ],
)
def test_the_first_word_on_an_end_stays_but_a_failure_or_a_persons_stop_explains_a_loss(run, first, then, stays):
    folder = run((0, first))
    history.record_end(folder, then, "later", 0)
    assert history.end_kind(history.read(folder)[0]) == stays


def test_a_line_cut_short_is_passed_over_and_gone_with_the_next_start(run):
    folder = run((0, LOST))
    with (folder / "resume.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    assert len(history.read(folder)) == 1
    history.record_start(folder, {"step": 5})
    assert [s["step"] for s in history.read(folder)] == [0, 5]


@pytest.mark.parametrize(
    "starts, bounds, step, words",
    [
        ([], {}, 0, None),
        ([(0, TIMEOUT), (5, TIMEOUT)], {}, 9, None),  # no bound but progress
        ([(0, TIMEOUT), (5, TIMEOUT)], {"max_timeouts": 2}, 9, None),
        (
            [(0, TIMEOUT), (5, TIMEOUT), (9, STOPPED)],
            {"max_timeouts": 1},
            12,
            "2 starts ended as timeout, the last with: why 5; resume.max_timeouts allows 1, raise it to go on",
        ),
        ([(0, PREEMPTED)], {"max_preemptions": 0}, 5, "1 starts ended as preempted"),
        (
            [(i, LOST) for i in range(6)],
            {},
            9,
            "6 starts ended as lost, the last with: why 5; resume.max_losses allows 5",
        ),
        ([(i, None) for i in range(6)], {}, 9, "ended without a word"),
        ([(0, LOST), (4, None), (4, LOST)], {}, 4, None),
        (
            [(4, LOST), (4, None), (4, PREEMPTED)],
            {},
            4,
            "the last 3 starts began at step 4 and left no newer checkpoint, the last with: why 4",
        ),
        ([(4, LOST), (4, None), (4, PREEMPTED)], {}, 5, None),  # the last one did get further
        ([(4, LOST), (4, None), (4, LOST)], {"max_starts_without_progress": 4}, 4, None),
        ([(4, LOST), (4, LOST), (4, FAILED)], {}, 4, None),  # a person started it after a failure
        ([(4, FAILED)] * 5, {}, 4, None),
        ([(0, TIMEOUT)] * 9 + [(4, COMPLETE)], {"max_timeouts": 1}, 4, None),  # has nothing to do any more
    ],
)
def test_when_a_run_must_not_be_started_again(run, starts, bounds, step, words):
    refused = history.why_not_restart(run(*starts), Resume(**bounds), step)
    assert refused is None if words is None else words in refused


@pytest.mark.parametrize(
    "kind, refused",
    [
        (FAILED, True),
        (STOPPED, True),
        (TIMEOUT, False),
        (PREEMPTED, False),
        (LOST, False),
        (None, False),
        (COMPLETE, False),
    ],
)
def test_a_job_does_not_repeat_a_start_that_failed_or_that_a_person_stopped(run, monkeypatch, kind, refused):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    told = history.why_not_restart_job(run((0, PREEMPTED), (4, kind)))
    assert told == (
        f"this start ended as {kind}: why 4; it is not repeated by itself, "
        "submit it again to go on from the last checkpoint"
        if refused
        else None
    )
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "this start ended before the run's folder was prepared" in history.why_not_restart_job(run())


def test_the_newest_published_checkpoint_counts_as_progress(run):
    folder = run((4, LOST), (4, LOST), (4, LOST))
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / ".writing-6-1").mkdir()
    assert "began at step 4" in history.why_not_restart(folder, Resume())
    (folder / "checkpoints" / "step-6").mkdir()
    assert history.why_not_restart(folder, Resume()) is None


@pytest.mark.parametrize(
    "signal, left, kind",
    [
        ("SIGINT", 100, STOPPED),
        ("SIGUSR2", 100, TIMEOUT),
        ("SIGTERM", -3, TIMEOUT),
        ("SIGUSR2", 5000, PREEMPTED),
        (None, None, PREEMPTED),
    ],
)
def test_what_a_signal_meant(monkeypatch, signal, left, kind):
    if left is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + left))
    assert history.kind_of_stop(signal) == kind


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1:00", 60),
        ("59", 59),
        ("2:03:04", 7384),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations_as_slurm_writes_them(text, seconds):
    assert slurm.parse_duration(text) == seconds


def test_without_slurm_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert (slurm.job(), slurm.restarts(), slurm.seconds_left(), slurm.states({"1"})) == (None, 0, None, {})
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert slurm.seconds_left() is None


def test_a_task_of_an_array_has_its_own_name(monkeypatch):
    for name, value in (("SLURM_JOB_ID", "9"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    assert slurm.job() == "7_2"


def test_how_a_start_ended_is_noted_on_a_full_disk_too(run, monkeypatch):
    folder = run((0, LOST), (4, None))

    def full(path, text, sync=True):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_text", full)
    history.record_end(folder, FAILED, "cannot write 'metrics.jsonl': No space left on device", 7)
    assert [history.end_kind(start) for start in history.read(folder)] == [LOST, FAILED]
    assert "No space left" in history.end_reason(history.read(folder)[-1])


def test_starts_that_signals_ended_before_they_were_noted_stay_on_record(run, monkeypatch):
    folder = run((0, PREEMPTED))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert history.end_before_noted(folder) is None
    answers = [history.why_not_restart_signalled(folder, 2) for _ in range(3)]
    assert [answer is None for answer in answers] == [True, False, True]
    assert "as many as resume.max_starts_without_progress lets end so" in answers[1]
    lines = [json.loads(line) for line in (folder / "unnoted.jsonl").read_text().splitlines()]
    assert [(line["job"], line.get("refused", False)) for line in lines] == [("8", False), ("8", True), ("8", False)]
    assert history.end_before_noted(folder) == "ended by a signal before its folder was prepared, 3 times"
    assert history.why_not_restart_signalled(folder, 2) is not None
    assert history.end_before_noted(folder).endswith("4 times, and it was not started again")
    run((0, None))
    assert history.end_before_noted(folder) is None, "a start that was noted came after them"


def test_a_note_of_signals_that_cannot_be_read_is_named(run, monkeypatch):
    folder = run((0, PREEMPTED))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (folder / "unnoted.jsonl").mkdir()
    for ask in (lambda: history.why_not_restart_signalled(folder, 3), lambda: history.end_before_noted(folder)):
        with pytest.raises(UserError, match="unnoted.jsonl"):
            ask()
