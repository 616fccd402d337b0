"""The probe's decisions, with a small script in place of the evaluation; the real one: parallel/test_probing.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import alive
from saved_checkpoints import save, steps

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_shards import encode, picture, write_tar

from mmtard.config import validate
from mmtard.errors import UserError
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.runs.checkpoints import resolve
from mmtard.runs.metrics import MetricLogger
from mmtard.training import probe
from mmtard.training.probe import Probe

ROBUST = {5: 0.25, 10: 0.5, 15: 0.25, 20: 0.5}  # at 10 and 20 alike, but 20 is better on clean images

DATA = {"fingerprint": "a1b2", "classes": "c3d4"}  # as `probe.check` gives them

SCRIPT = """
import json, os, sys, time
asked = json.load(open(sys.argv[2]))
step = int(asked["checkpoint"].rsplit("-", 1)[1])
while not os.path.exists(os.environ["GO"]): time.sleep(0.01)
if os.environ.get("FAIL") == str(step): sys.exit("no luck")
of = lambda accuracy: {"accuracy": accuracy, "interval95": [0, 1], "n": asked["n_samples"]}
json.dump({"clean": of(step / 100), "robust": of(json.loads(os.environ["ROBUST"])[str(step)])}, open(sys.argv[3], "w"))
"""


@pytest.fixture
def start(tree, tmp_path, monkeypatch):
    """Call with settings of the probe: a start of a run of `total` steps that goes on from its newest checkpoint."""
    monkeypatch.setattr(probe, "PROCESS", [sys.executable, "-c", SCRIPT])
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    monkeypatch.setenv("ROBUST", json.dumps(ROBUST))
    (tmp_path / "go").touch()
    made = []

    def make(at=0, keep_last=1, data=DATA, total=20, **settings):
        tree["train"]["steps"], tree["checkpoint"] = total, {"every": 5}
        tree["probe"] = {"data": "val", "every": 5, "n_samples": 40, **settings}
        config, run = validate(tree), tmp_path / "run"
        run.mkdir(exist_ok=True)
        checkpoints = Checkpoints(run, keep_last)
        metrics = MetricLogger(run, at, total, 99)
        made.append(Probe(config, checkpoints, metrics, at, data))
        return SimpleNamespace(probe=made[-1], checkpoints=checkpoints, run=run, metrics=metrics)

    yield make
    for each in made:
        if each.process is not None:
            each.process.kill()
            each.process.wait()


def settle(s, step):
    end = time.monotonic() + 20
    s.probe.after_step(step)
    while s.probe.process is not None and time.monotonic() < end:
        time.sleep(0.01)
        s.probe.after_step(0)
    assert s.probe.process is None


def rows(s, name="probes.jsonl"):
    path = s.run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def most_robust(s):
    return os.readlink(s.run / "checkpoints" / "most_robust")


def done(s, *interruption):
    s.probe.finish(not interruption, interruption and interruption[0], lambda: None)


def test_each_due_checkpoint_is_measured_and_the_most_robust_stays(start, capsys):
    s = start()
    for step in (5, 10, 15):
        save(s.checkpoints, step)
        settle(s, step)
    assert [(r["step"], r["clean"], r["robust"], r["interval95"], r["n"]) for r in rows(s)] == [
        (n, n / 100, ROBUST[n], [0, 1], 40) for n in (5, 10, 15)
    ]
    assert rows(s)[0]["protocol"] == {
        "data": "val",
        **DATA,
        "norm": "linf",
        "eps": "2/255",
        "steps": 10,
        "n_samples": 40,
        "ema": False,
        "templates": ["This is a photo of a {}"],
    }
    assert steps(s.run) == [10, 15] and most_robust(s) == "step-10"
    assert resolve(s.run / "checkpoints" / "most_robust")[1].name == "step-10"
    save(s.checkpoints, 20)
    s.probe.after_step(20)
    done(s)
    assert most_robust(s) == "step-20" and steps(s.run) == [20], "of equally robust ones the better on clean images"
    assert (
        "probe of step 10: clean 10.0 %, robust 50.0 % (0.0-100.0) against linf 2/255, 40 samples"
        in capsys.readouterr().out
    )
    assert not (s.run / probe.PROBE).exists()


def test_one_at_a_time_the_newest_next_and_what_is_measured_stays(start, tmp_path):
    (tmp_path / "go").unlink()
    s = start(every=5)
    for step in (5, 10, 15):
        save(s.checkpoints, step)
        began = time.monotonic()
        s.probe.after_step(step)
        assert time.monotonic() - began < 1 and s.probe.step == 5, "the loop does not wait"
    assert steps(s.run) == [5, 15], "5 is being measured, 10 was overtaken"
    (tmp_path / "go").touch()
    settle(s, 16)
    assert [r["step"] for r in rows(s)] == [5, 15]


def test_only_multiples_of_every_and_the_last_step_are_due(start):
    s = start(every=10)
    for step in (5, 10, 15, 20):
        save(s.checkpoints, step)
        for n in range(step - 4, step + 1):
            s.probe.after_step(n)
        settle(s, 0)
    assert [r["step"] for r in rows(s)] == [10, 20]


def test_what_an_interruption_cost_is_made_up_for(start, tmp_path):
    s = start(keep_last=2)
    save(s.checkpoints, 5)
    settle(s, 5)
    (tmp_path / "go").unlink()
    save(s.checkpoints, 10)
    s.probe.after_step(10)
    process = s.probe.process
    done(s, SimpleNamespace(signal="SIGTERM"))
    assert process.returncode == -signal.SIGKILL and [r["step"] for r in rows(s)] == [5]
    (tmp_path / "go").touch()
    s = start(at=10)
    assert rows(s)[0]["step"] == 5
    settle(s, 11)
    assert [r["step"] for r in rows(s)] == [5, 10] and most_robust(s) == "step-10"
    # A start from an earlier step does again what came later, its probes too.
    s = start(at=5)
    assert [r["step"] for r in rows(s)] == [5] and most_robust(s) == "step-5"


def test_the_end_waits_for_the_last_probe_as_long_as_it_may(start, tmp_path, capsys):
    (tmp_path / "go").unlink()
    s, beats = start(at=20, wait_minutes=0.005), []
    save(s.checkpoints, 20)
    s.probe.after_step(20)
    s.probe.finish(True, None, lambda: beats.append(1))
    assert beats and rows(s) == [] and "more than 0.005 minutes" in capsys.readouterr().out
    (tmp_path / "go").touch()
    s = start(at=20)
    done(s)
    assert [r["step"] for r in rows(s)] == [20], "a start of the complete run makes up for it"


def test_a_probe_that_fails_is_an_event_and_is_tried_again_by_the_next_start(start, monkeypatch):
    monkeypatch.setenv("FAIL", "5")
    s = start(keep_last=9)
    save(s.checkpoints, 5)
    settle(s, 5)
    assert rows(s) == [] and rows(s, "events.jsonl") == [
        {"step": 5, "event": "probe failed", "reason": "exit status 1", "said": ["no luck"]}
    ]
    s.probe.after_step(6)
    assert s.probe.process is None
    monkeypatch.delenv("FAIL")
    s = start(at=5)
    settle(s, 6)
    assert [r["step"] for r in rows(s)] == [5]


def test_a_process_that_cannot_be_started_ends_nothing(start, monkeypatch):
    monkeypatch.setattr(probe, "PROCESS", ["/nowhere/python"])
    s = start()
    save(s.checkpoints, 5)
    s.probe.after_step(5)
    s.probe.after_step(6)
    assert [(e["step"], e["event"]) for e in rows(s, "events.jsonl")] == [
        (5, "probe failed")
    ] and "No such file" in rows(s, "events.jsonl")[0]["reason"]
    save(s.checkpoints, 10)
    assert steps(s.run) == [10], "what failed is not held"


def test_probes_of_another_protocol_are_not_compared(start):
    s = start(keep_last=9)
    save(s.checkpoints, 10)
    settle(s, 10)
    s = start(at=10, eps="1/255", keep_last=9)
    settle(s, 11)
    save(s.checkpoints, 15)
    settle(s, 15)
    assert [(r["step"], r["protocol"]["eps"]) for r in rows(s)] == [(10, "2/255"), (10, "1/255"), (15, "1/255")]


@pytest.mark.parametrize("other", [{"fingerprint": "ffff"}, {"classes": "ffff"}])
def test_probes_of_data_that_were_rewritten_are_not_compared_and_left_out_in_a_line(start, capsys, monkeypatch, other):
    s = start(keep_last=9)
    save(s.checkpoints, 10)
    settle(s, 10)
    assert most_robust(s) == "step-10"
    capsys.readouterr()
    monkeypatch.setenv("ROBUST", json.dumps({10: 0.125, 15: 0.25}))
    s = start(at=10, keep_last=9, data=DATA | other)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "probes of earlier starts are not compared with this one's, nor chosen from: 1 that differ in "
        + next(iter(other))
    )
    save(s.checkpoints, 15)
    settle(s, 15)
    assert most_robust(s) == "step-15", "by the data that are there, on which step 10 is measured again"


def test_the_most_robust_of_data_that_were_rewritten_is_measured_anew_before_it_may_go(start, monkeypatch):
    monkeypatch.setenv("ROBUST", json.dumps({5: 0.5, 10: 0.25}))
    s = start()
    save(s.checkpoints, 5)
    settle(s, 5)
    save(s.checkpoints, 10)
    settle(s, 10)
    assert most_robust(s) == "step-5", "more robust than step 10"
    monkeypatch.setenv("ROBUST", json.dumps({5: 0.5, 10: 0.25, 15: 0.125}))
    s = start(at=10, data=DATA | {"fingerprint": "ffff"})
    save(s.checkpoints, 15)
    settle(s, 15)
    save(s.checkpoints, 20)
    assert most_robust(s) == "step-5" and steps(s.run) == [5, 20]


@pytest.mark.parametrize("earlier", [{"every": 5}, {"every": 10, "total": 5}], ids=["every changed", "lengthened"])
def test_the_most_robust_is_measured_anew_also_where_its_step_is_no_longer_due(start, monkeypatch, earlier):
    monkeypatch.setenv("ROBUST", json.dumps({5: 0.5, 10: 0.25}))
    s = start(**earlier)
    save(s.checkpoints, 5)
    settle(s, 5)
    s = start(at=5, every=10, data=DATA | {"fingerprint": "ffff"})
    save(s.checkpoints, 10)
    settle(s, 10)
    assert [(r["step"], r["protocol"]["fingerprint"]) for r in rows(s)] == [(5, "a1b2"), (5, "ffff"), (10, "ffff")]
    save(s.checkpoints, 15)
    assert most_robust(s) == "step-5" and steps(s.run) == [5, 15]


@pytest.mark.parametrize("robust, best", [({5: 0.25, 10: 0.5, 15: 0.25}, 10), ({5: 0.75, 10: 0.5, 15: 0.25}, 5)])
def test_where_a_run_goes_back_to_its_first_settings_the_most_robust_by_either_stays_until_both_are_measured(
    start, monkeypatch, robust, best
):
    monkeypatch.setenv("ROBUST", json.dumps(robust))
    s = start()
    save(s.checkpoints, 5)
    settle(s, 5)
    monkeypatch.setenv("ROBUST", json.dumps({5: 0.25, 10: 0.5}))  # against the smaller eps, step 10 is better
    s = start(at=5, eps="1/255", keep_last=2)
    save(s.checkpoints, 10)
    settle(s, 10)
    assert most_robust(s) == "step-10"
    monkeypatch.setenv("ROBUST", json.dumps(robust))
    s = start(at=10)  # whose own best so far is step 5
    save(s.checkpoints, 15)
    assert most_robust(s) == "step-10" and steps(s.run) == [5, 10, 15]
    settle(s, 15)
    assert most_robust(s) == f"step-{best}" and [r["step"] for r in rows(s)] == [5, 5, 10, 10, 15]
    done(s)
    assert steps(s.run) == [best, 15]


def test_probes_of_an_earlier_version_which_did_not_note_the_data_count_as_before(start, capsys):
    s = start(keep_last=9, data={})
    save(s.checkpoints, 10)
    settle(s, 10)
    capsys.readouterr()
    s = start(at=10, keep_last=9)
    assert "not compared" not in capsys.readouterr().out
    save(s.checkpoints, 15)
    settle(s, 15)
    assert [r["step"] for r in rows(s)] == [10, 15] and most_robust(s) == "step-10"


def test_what_is_noted_of_the_data_changes_with_them_and_with_the_names(tree, tmp_path):
    def data(seed, names, folder=tmp_path / "val"):
        shutil.rmtree(folder, ignore_errors=True)  # its index, too
        folder.mkdir()
        write_tar(folder / "0.tar", [("a.jpg", encode(picture(seed))), ("a.cls", b"0")])
        (folder / "classnames.txt").write_text(names)
        return probe.check(validate(tree))

    tree["train"]["steps"], tree["checkpoint"] = 20, {"every": 5}
    assert probe.check(validate(tree)) == {}
    tree["probe"] = {"data": str(tmp_path / "val"), "every": 5}
    first, same, of_pixels, of_names = data(1, "cat\n"), data(1, "cat\n"), data(2, "cat\n"), data(1, "dog\n")
    assert first == same and first.keys() == {"fingerprint", "classes"}
    assert [key for key in first if first[key] != of_pixels[key]] == ["fingerprint"]
    assert [key for key in first if first[key] != of_names[key]] == ["classes"]


def test_settings_that_do_not_fit_are_refused(start, tree):
    with pytest.raises(UserError, match="probe.every: 7 is no multiple of checkpoint.every 5"):
        start(every=7)
    with pytest.raises(UserError, match="probe.ema: true, but the run keeps no moving average"):
        start(ema=True)
    tree["probe"].pop("ema")
    with pytest.raises(UserError, match="val"):
        tree["probe"]["every"] = 5
        probe.check(validate(tree))


BACKGROUND = """
import os, signal, sys, time
from mmtard.training import probe_process as process
def measure(asked):
    blocked = sorted(s.name for s in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    print(os.getpid(), os.nice(0), "+".join(blocked), asked, flush=True)
    time.sleep(60)
process.measure = measure
process.main(sys.argv[1], "/dev/stdin", "/dev/null")
"""
PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-c", sys.argv[1], str(os.getpid() + int(sys.argv[2]))]
child = subprocess.Popen(command, stdin=subprocess.PIPE)
child.stdin.write(b"7")
child.stdin.close()
if sys.argv[2] != "0": sys.exit(child.wait())
time.sleep(60)
"""


def test_the_process_is_deaf_to_the_jobs_signals_and_dies_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, BACKGROUND, "0"], stdout=subprocess.PIPE, text=True)
    child, *words = parent.stdout.readline().split()
    assert words == ["19", "SIGHUP+SIGINT+SIGTERM+SIGUSR2", "7"]
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(int(child), number)
    time.sleep(0.2)
    assert alive(child)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


def test_the_process_does_not_start_when_its_parent_is_gone_already():
    done = subprocess.run([sys.executable, "-c", PARENT, BACKGROUND, "1"], capture_output=True, text=True)
    assert done.returncode == 1 and "the parent process is gone" in done.stderr and not done.stdout
