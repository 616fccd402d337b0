import errno
import io
import json
import math
import os
from types import SimpleNamespace

import pytest

from mmtard.errors import UserError
from mmtard.runs.journal import cut, missing
from mmtard.runs.metrics import MetricLogger, SilentLogger


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(step, **more):
    return {"step": step, "loss": 1 / step, "images_per_s": 100.0, **more}


@pytest.fixture
def opened():
    """Call as Metrics(...); closed at the end."""
    made = []

    def make(run, start=0, steps=4, log_every=2):
        made.append(MetricLogger(run, start, steps, log_every))
        return made[-1]

    yield make
    for metrics in made:
        metrics.close()


LINES = "".join(json.dumps({"step": n, "loss": n / 2}) + "\n" for n in (1, 2, 3))


@pytest.mark.parametrize(
    "text, step, kept",
    [
        (LINES, 2, [1, 2]),
        (LINES, 3, [1, 2, 3]),
        (LINES, 0, []),
        (LINES + '{"step": 4, "lo', 9, [1, 2, 3]),
        (LINES + "\0\0\0\0", 9, [1, 2, 3]),  # what a power cut may leave
        ("", 5, []),
        (LINES.replace('"step": 2', '"st'), 9, [1, 3]),  # a damaged line takes none of the later ones with it
        ('12\n"x"\n{"a": 1}\n{"step": "2"}\n' + LINES, 9, [1, 2, 3]),
    ],
)
def test_cut_keeps_whole_lines_up_to_the_step(tmp_path, text, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    cut(path, step)
    assert [r["step"] for r in rows(path)] == kept and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_leaves_a_file_that_is_not_there_alone(tmp_path):
    cut(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_every_step_stands_once_after_an_interruption(tmp_path, opened):
    first = opened(tmp_path)
    for step in (1, 2, 3):
        first.write_row(row(step, lr=0.1))
    first.event(3, "replaced", samples=["a", "b"])
    again = opened(tmp_path, start=2)  # the newest checkpoint is that of step 2
    for step in (3, 4):
        again.write_row(row(step, lr=0.2))
    assert [(r["step"], r["lr"]) for r in rows(tmp_path / "metrics.jsonl")] == [(1, 0.1), (2, 0.1), (3, 0.2), (4, 0.2)]
    assert rows(tmp_path / "events.jsonl") == []


def test_a_finished_step_is_on_disk_at_once(tmp_path, opened):
    metrics = opened(tmp_path)
    metrics.write_row(row(1))
    metrics.event(1, "replaced", samples=["x.tar/a"])
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0, "images_per_s": 100.0}]
    assert rows(tmp_path / "events.jsonl") == [{"step": 1, "event": "replaced", "samples": ["x.tar/a"]}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_valid_json(tmp_path, opened, value):
    metrics = opened(tmp_path, steps=2)
    for step in (1, 2):
        metrics.write_row(row(step, grad_norm=value))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [r["grad_norm"] for r in rows(tmp_path / "metrics.jsonl")] == [None, None]


def test_the_console_has_a_line_every_so_often_at_the_end_and_for_events(tmp_path, opened, capsys):
    metrics = opened(tmp_path, steps=5, log_every=2)
    for step in range(1, 6):
        metrics.write_row(row(step, kl=0.25, acc_clean=0.5, acc_adv=0.125))
    metrics.event(5, "replaced", samples=[f"s{i}" for i in range(9)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out[:3]] == ["step 2/5", "step 4/5", "step 5/5"] and len(out) == 4
    assert "loss 0.2  kl 0.25  acc_clean 0.5  acc_adv 0.125" in out[2]
    assert "100 images/s" in out[2] and "left 0:00:00" in out[2]
    assert out[3] == "step 5: replaced  samples s0, s1, s2, s3, ... (9)"


def test_a_step_is_a_row_of_what_the_ranks_agreed_on_and_the_silent_twin_takes_the_same_calls(tmp_path, opened):
    metrics, silent = opened(tmp_path), SilentLogger()
    agreed = SimpleNamespace(means={"loss": 2.0}, quantiles={"loss_p90": 3.0}, digest=7.0, skipped=1, replaced=2)
    for logger in (metrics, silent):
        logger.begin(lambda seconds: {"seconds": seconds, "images_per_s": 8 / seconds})
        logger.step(1, agreed, SimpleNamespace(grad_norm=math.inf), 1e-4)
    (made,) = rows(tmp_path / "metrics.jsonl")
    assert 0 < made["seconds"] < 60 and made["images_per_s"] == 8 / made["seconds"]
    expected = {"step": 1, "loss": 2.0, "loss_p90": 3.0, "lr": 1e-4, "grad_norm": None, "batch": 7}
    expected |= {"skipped": 1, "replaced": 2}
    assert list(made) == [*expected, "seconds", "images_per_s"] and made.items() >= expected.items()
    calls = {name for name in vars(MetricLogger) if not name.startswith("_")}
    assert calls == {name for name in vars(SilentLogger) if not name.startswith("_")}


def test_damaged_lines_are_told_of_and_bytes_that_are_no_text_are_left_out(tmp_path, opened, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    opened(tmp_path, start=2)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert rows(tmp_path / "events.jsonl") == [
        {"step": 2, "event": "damaged lines left out", "file": "metrics.jsonl", "lines": 1}
    ]


def test_steps_whose_rows_a_crash_of_the_machine_took_are_named_once(tmp_path, opened, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in (1, 3, 4, 8, 10, 11)))
    opened(tmp_path, start=10)
    assert capsys.readouterr().out == "step 10: steps without metrics  steps 2, 5 to 7, 9\n"
    named = [{"step": 10, "event": "steps without metrics", "steps": ["2", "5 to 7", "9"]}]
    assert rows(tmp_path / "events.jsonl") == named
    opened(tmp_path, start=10)
    assert rows(tmp_path / "events.jsonl") == named and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "steps, last, gaps",
    [
        ([], 0, []),
        ([], 3, [(1, 3)]),
        ([1, 2], 2, []),
        ([3, 1, 1, -5, 9], 5, [(2, 2), (4, 5)]),
        ([2], 10**18, [(1, 1), (3, 10**18)]),
    ],
)
def test_the_gaps_among_steps(steps, last, gaps):
    assert missing(steps, last) == gaps


def test_the_rows_are_brought_to_the_disk_when_asked_and_a_closed_file_is_there(tmp_path, opened, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))), fsync(file))
    )
    metrics = opened(tmp_path)
    metrics.write_row(row(1))
    metrics.sync()
    assert synced == ["metrics.jsonl", "events.jsonl"]
    metrics.close()
    metrics.sync()
    assert len(synced) == 4


def test_a_full_disk_is_one_line_that_names_it_and_leaves_no_half_row(tmp_path, opened):
    metrics = opened(tmp_path)
    metrics.write_row(row(1))
    file = metrics._journals["metrics.jsonl"]._file

    class Full:
        """Takes ten bytes of a row, and no more."""

        seek, truncate, fileno, close = file.seek, file.truncate, file.fileno, file.close

        def write(self, data):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data[: len(data) - 10])

    metrics._journals["metrics.jsonl"]._file = Full()
    words = (
        r"cannot write '.*metrics.jsonl': No space left on device \(the disk at '.*' has .* free\); free space there"
    )
    metrics.write_row(row(2))
    with pytest.raises(UserError, match=words):
        raise metrics.failure
    metrics._journals["metrics.jsonl"]._file = file  # room again: no row follows the one that is missing
    metrics.write_row(row(3))
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_console_that_is_closed_is_noted_and_the_run_goes_on(tmp_path, opened, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    metrics = opened(tmp_path, log_every=1)
    for step in (1, 2, 3):
        metrics.write_row(row(step))
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    assert [r["event"] for r in rows(tmp_path / "events.jsonl")] == ["the console was closed"]


def test_a_run_name_is_no_markup_and_no_control_characters_reach_the_terminal(tmp_path, opened, capsys):
    opened(tmp_path).event(1, "replaced", samples=["a[red]b", "c\x1b[2Jd"])
    assert capsys.readouterr().out == "step 1: replaced  samples a[red]b, c?[2Jd\n"


def test_a_run_of_more_steps_than_any_time_shows_the_longest_time(tmp_path, opened, capsys):
    opened(tmp_path, steps=10**18, log_every=1).write_row(row(1))
    assert "left 41666666 days" in capsys.readouterr().out
