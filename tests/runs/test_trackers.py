"""TensorBoard and Weights & Biases beside a run's own files."""

import json
import math
import struct
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmtard.config import Log, validate
from mmtard.errors import UserError
from mmtard.runs import trackers
from mmtard.runs.metrics import MetricLogger
from mmtard.runs.trackers import TensorBoard

PROBED = {"clean": 0.75, "robust": 0.5, "interval95": [0.3, 0.7], "n": 20, "protocol": {"norm": "linf", "eps": "2/255"}}


def row(step, **more):
    return {"step": step, "loss": 1 / step, "images_per_s": 100.0, **more}


def test_tensorboard_shows_a_step_that_was_done_again_once(tmp_path):
    first = MetricLogger(
        tmp_path, start=0, steps=4, log_every=2, trackers={"TensorBoard": lambda: TensorBoard(tmp_path, 0)}
    )
    for step in (1, 2, 3):
        first.write_row(row(step, grad_norm=math.inf))
    first.close()
    again = MetricLogger(
        tmp_path, start=1, steps=4, log_every=2, trackers={"TensorBoard": lambda: TensorBoard(tmp_path, 1)}
    )
    again.write_row(row(2))
    again.probe({"step": 1, **PROBED})  # of a checkpoint that steps have overtaken
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/total")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for name in ("clean", "robust") for e in board.Scalars(f"accuracy/{name}")] == [
        (1, 0.75),
        (1, 0.5),
    ]
    assert set(board.Tags()["scalars"]) == {
        "loss/total",
        "speed/images_per_s",
        "accuracy/clean",
        "accuracy/robust",
    }


class Broken:
    def __init__(self, at):
        self.at, self.logged = at, []
        if at == "open":
            raise OSError("no network")

    def log(self, step, numbers):
        if self.at == step:
            raise ValueError("quota\nexceeded")
        self.logged.append((step, numbers))

    def close(self):
        if self.at == "close":
            raise RuntimeError("gone")


@pytest.mark.parametrize(
    "at,logged,said",
    [
        ("open", None, "OSError: no network"),
        (2, [1], "ValueError: quota exceeded"),
        ("close", [1, 2, 3], "RuntimeError: gone"),
    ],
)
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(tmp_path, capsys, at, logged, said):
    made, whole = [], Broken(None)
    metrics = MetricLogger(
        tmp_path, 0, 3, 99, {"broken": lambda: made.append(Broken(at)) or made[0], "whole": lambda: whole}
    )
    for step in (1, 2, 3):
        metrics.write_row(row(step, grad_norm=math.nan))
    metrics.close()
    assert [s for s, _ in made[0].logged] == logged if made else logged is None
    assert whole.logged == [(s, {"loss/total": 1 / s, "speed/images_per_s": 100.0}) for s in (1, 2, 3)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    assert lines == [f"broken gets no more numbers of this start: {said}"]


def test_a_missing_package_is_an_error_of_one_line_that_names_the_remedy(monkeypatch):
    wanted = Log(wandb={"project": "p"})
    trackers.check(wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trackers.check(Log())
    with pytest.raises(UserError, match=r"^log\.wandb: .*pip install mmtard\[wandb\]"):
        trackers.check(wanted)


WANDB_RUN = f"""
import sys
from mmtard.config import load
from mmtard.runs.metrics import MetricLogger
from mmtard.runs.trackers import chosen
config, start = load(sys.argv[1]), int(sys.argv[2])
metrics = MetricLogger(__import__("pathlib").Path(config.run_dir), start, 4, 99, chosen(config, start))
for step in range(start + 1, start + 3):
    metrics.write_row({{"step": step, "loss": 1.0 / step, "images_per_s": 1.0, "batch": 7}})
metrics.probe({{"step": start + 1, **{PROBED}}})
metrics.close()
"""


def leveldb_log(data):
    """The records of a W&B file: 7 bytes of header, then LevelDB's log format.

    Its blocks have 32 KiB; crc32, length and kind stand before each piece.
    """
    at, record = 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.slow
def test_every_start_of_a_run_goes_on_in_one_weights_and_biases_run(tree, write, tmp_path):
    """Offline, read back from the records that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    tree["log"] = {"tensorboard": False, "wandb": {"project": "robust", "tags": ["a"], "mode": "offline"}}
    run = tmp_path / "run"
    run.mkdir()
    assert validate(tree).log.wandb.project == "robust"
    for start in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", WANDB_RUN, str(write(tree)), str(start)], capture_output=True, text=True
        )
        assert done.returncode == 0 and "no more numbers" not in done.stdout, done
    runs, history, probes, settings = [], {}, [], {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.project, list(record.run.tags)))
                settings |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("history"):
                numbers = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                if "loss/total" in numbers:
                    history[numbers["_step"]] = numbers["loss/total"]
                if "accuracy/step" in numbers:
                    probes.append(tuple(numbers[f"accuracy/{name}"] for name in ("step", "clean", "robust")))
            if record.HasField("metric") and record.metric.glob_name == "accuracy/*":
                assert record.metric.step_metric == "accuracy/step"
    identity = json.loads((run / "wandb.json").read_text())["id"]
    assert set(map(str, runs)) == {str((identity, "robust", ["a"]))}
    assert history == {s: 1 / s for s in (1, 2, 3, 4)} and probes == [(1, 0.75, 0.5), (3, 0.75, 0.5)]
    assert settings["train"]["batch_size"] == 8 and settings["attack"]["eps"] == "2/255"


def test_curves_are_grouped_and_a_digest_is_none_of_them():
    columns = ("step", "loss", "kl_clean", "w_clean", "w_clean_p10", "lr", "grad_norm", "batch", "skipped", "mfu")
    columns += ("acc_clean", "acc_adv")
    tags = {"loss/total", "loss/kl_clean", "weight/clean", "weight/clean_p10"}
    tags |= {"train_accuracy/acc_clean", "train_accuracy/acc_adv"}
    tags |= {"optimizer/lr", "optimizer/grad_norm", "counts/skipped", "speed/mfu"}
    assert trackers.curves(dict.fromkeys(columns, 1.0)).keys() == tags


@pytest.mark.parametrize("content", ["", "[]", '{"id": "../../x"}', '{"id": null}', "\0\0"])
def test_a_damaged_identity_of_a_run_is_made_anew(tmp_path, content):
    (tmp_path / "wandb.json").write_text(content)
    made = trackers._identity(tmp_path)
    assert len(made) == 16 and trackers._identity(tmp_path) == made
