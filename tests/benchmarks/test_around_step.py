"""What `mmtard bench train` tells of a run around its steps: a delay of known length is in its own row alone."""

import itertools
import json

import pytest

from mmtard.benchmarks.pictures import draw_pictures
from mmtard.config import Data, validate
from mmtard.data.shard_writer import write_shards
from mmtard.errors import UserError

SLOW = 1.0  # seconds of the tests' own clock, on which all else takes milliseconds, however busy the machine is
ROWS = {"load", "logging", "checkpoint"}


@pytest.fixture
def tiny(tree, vit):
    model = {"arch": vit, "weights": "random"}
    attack = {"eps": "8/255", "step_size": "2/255", "steps": 1}
    engine = {"precision": "float32", "device": "cpu", "zero_stage": 2}
    tree |= {"student": model, "teachers": {"clean": model, "robust": model}, "attack": attack, "engine": engine}
    tree |= {"log": {"every": 2, "tensorboard": False}, "checkpoint": {"every": 4}}
    return tree


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of two shards of 6 samples, and their index."""
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "images", 12)
    write_shards(folder / "images", folder / "shards", samples_per_shard=6, jobs=1, progress=False)
    return folder / "shards"


@pytest.fixture
def measure(ranks, tmp_path):
    """Call with a configuration's tree: the JSON of `mmtard bench train` on it, of mmtard's own step alone."""
    from mmtard.benchmarks.training import TrainingBenchmark

    def run(tree):
        out = tmp_path / "train.json"
        TrainingBenchmark(validate(tree), rounds=1, warm_up=1, classes=5, variants=["mmtard"]).run(out)
        return json.loads(out.read_text())

    return run


@pytest.fixture
def slow(monkeypatch):
    """Call with the owner and the name of a function: each call of it takes so much longer, and is counted."""
    asked, delays = itertools.count(), []
    monkeypatch.setattr("time.perf_counter", lambda: 1e-5 * next(asked) + sum(delays))

    def delay(owner, name):
        function, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(name)
            delays.append(SLOW)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
        return calls

    return delay


def only_slow(found, name, seconds):
    """Whether the row holds so many seconds, and neither another row nor the step does."""
    around, step = found["around_the_step"], found["variants"]["mmtard"]
    fast = [around[other]["median"] for other in ROWS - {name} if "median" in around[other]]
    return seconds <= around[name]["median"] < 1.1 * seconds and max(*fast, *step["seconds"]) < SLOW / 10


def added(found, name, shared_by):
    return found["around_the_step"][name]["median"] / shared_by / found["variants"]["mmtard"]["seconds"][0]


def test_a_slow_writer_is_in_the_row_of_logging_alone_its_console_line_shared_out(measure, tiny, slow, capsys):
    from mmtard.runs.journal import Journal
    from mmtard.runs.metrics import MetricLogger

    rows, lines = slow(Journal, "append"), slow(MetricLogger, "print")
    found = measure(tiny)
    assert only_slow(found, "logging", SLOW + SLOW / 2)  # log.every steps have a row each, and one line among them
    assert len(rows) == 2 * len(lines) == 4  # in a warm-up and in a round
    assert found["around_the_step"]["logging"]["added_share"] == pytest.approx(added(found, "logging", 1))
    assert "step 2/4" not in capsys.readouterr().out  # the run's own lines are no part of the table


def test_a_slow_copy_is_in_the_row_of_the_checkpoint_alone_and_its_write_in_none(measure, tiny, slow, capsys):
    from mmtard.benchmarks import checkpoint
    from mmtard.training.engine import Engine

    writes, copies = slow(checkpoint, "_longest_pause"), slow(Engine, "full_state")
    found = measure(tiny)
    assert only_slow(found, "checkpoint", SLOW) and len(copies) == len(writes) == 1
    assert found["around_the_step"]["checkpoint"]["added_share"] == pytest.approx(added(found, "checkpoint", 4))
    printed, table = capsys.readouterr().out, found["tables"][2]
    assert [row[0].partition(":")[0] for row in table["rows"]] == ["load", "logging", "checkpoint"]
    assert table["rows"][2][1] == f"{found['around_the_step']['checkpoint']['median']:.4g}"
    assert "Around mmtard's step" in printed and "checkpoint: the loop stands still" in printed


def test_a_slow_reader_is_in_the_row_of_loading_alone_and_waited_for_beyond_the_step(measure, tiny, shards, slow):
    from mmtard.data.samples import SampleReader

    tiny["data"] |= {"shards": str(shards), "workers": 2}
    batches = slow(SampleReader, "_batch")
    found = measure(tiny)
    assert only_slow(found, "load", SLOW) and len(batches) == 2
    assert found["around_the_step"]["load"]["added_share"] == pytest.approx(added(found, "load", 2) - 1)


@pytest.mark.parametrize("workers, share", [(0, 3.0), (1, 2.0), (2, 0.5), (4, 0.0)])
def test_a_batch_that_takes_three_steps_is_hidden_by_enough_workers(tiny, ranks, workers, share):
    from mmtard.benchmarks.around_step import AroundStep

    tiny["data"]["workers"] = workers
    step = AroundStep(validate(tiny), None, 2.0, None, ranks, None, 1, None)
    step.batch_seconds = lambda: [6.0]
    assert step.load().numbers()["added_share"] == share


def test_what_cannot_be_measured_is_said_and_costs_no_other_number(measure, tiny, monkeypatch, capsys):
    from mmtard.runs.checkpoint_writer import Checkpoints

    def refuse(*args):
        raise UserError("no room for a checkpoint")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    tiny["data"]["shards"] = "nowhere"
    found = measure(tiny)
    around = found["around_the_step"]
    assert around["checkpoint"] == {"not_measured": "no room for a checkpoint"}
    assert around["load"] == {"not_measured": "no shards; `mmtard bench data` measures it"}
    assert around["logging"]["median"] > 0 and found["variants"]["mmtard"]["seconds"][0] > 0
    printed = capsys.readouterr().out
    assert "load: not measured: no shards; `mmtard bench data` measures it" in printed
    assert "checkpoint: not measured: no room for a checkpoint" in printed


@pytest.mark.parametrize("every, share", [(4, 0.5), (40, 0.2)])
def test_a_run_that_ends_before_its_first_checkpoint_is_due_has_one_all_the_same(tiny, monkeypatch, every, share):
    from mmtard.benchmarks.around_step import AroundStep

    tiny["checkpoint"]["every"] = every
    monkeypatch.setattr(AroundStep, "stalls", lambda self: [2.0])
    config = validate(tiny)
    assert config.train.steps == 10
    around = AroundStep(config, None, 1.0, None, None, None, 1, None).checkpoint()
    assert around.numbers()["added_share"] == share
    assert around.settings == ("checkpoint.every=4" if every == 4 else "checkpoint.every=40 train.steps=10")


def test_shards_that_would_be_fetched_or_indexed_first_are_left_alone(shards, tmp_path):
    from mmtard.benchmarks.around_step import indexed_dataset

    (tmp_path / "0.tar").write_bytes((shards / "000000.tar").read_bytes())
    for given, why in (("file:there.tar", "to be fetched"), (str(tmp_path), "without an index")):
        with pytest.raises(UserError, match=f"{why}; .mmtard bench data. "):
            indexed_dataset(Data(shards=given))
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    assert len(indexed_dataset(Data(shards=str(shards)))) == 12
