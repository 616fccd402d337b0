"""Whole runs on one GPU: bits that repeat and survive an interruption, the probe, stored embeddings, the preflight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmtard.distributed import ranks as process_group
from mmtard.distributed.interruption import EXIT_REQUEUE, Interruption
from mmtard.embeddings.build import cache
from mmtard.runs.metrics import TIMINGS
from mmtard.training import preflight
from mmtard.training.train import train

from .conftest import DEVICE, only_on_cuda

ROOT = Path(__file__).parents[2]


NEVER = Interruption()


class AfterSteps(Interruption):
    """A signal that comes during a step; the loop asks once a step."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        if self.left <= 0:
            self.signal = "SIGUSR2"
        return self.left <= 0


@pytest.fixture
def run_to_the_end():
    """Call with a configuration: its run trained here, as the only rank; the exit status."""
    before = dict(os.environ)
    yield lambda config, interruption=NEVER: train(config, interruption)
    process_group.stop()
    os.environ.clear()
    os.environ.update(before)


def metrics(run: Path) -> list[dict]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in lines]


def weights(run: Path) -> dict[str, bytes]:
    tensors = load_file(run / "checkpoints" / "latest" / "weights.safetensors")
    return {name: tensor.float().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("precision, stage", [("bf16", 2), ("float32", 0)])
def test_deterministic_runs_repeat_their_bits_and_keep_them_through_an_interruption(
    job, run_to_the_end, precision, stage
):
    engine = {"engine": {"precision": precision, "zero_stage": stage}}
    (first, run), (second, again), (third, resumed) = (job(name, **engine) for name in ("first", "again", "resumed"))
    assert run_to_the_end(first) == run_to_the_end(second) == 0
    assert run_to_the_end(third, AfterSteps(3)) == EXIT_REQUEUE
    assert len(metrics(resumed)) == 3 and run_to_the_end(third) == 0
    assert metrics(again) == metrics(run) and weights(again) == weights(run)
    assert metrics(resumed) == metrics(run) and weights(resumed) == weights(run)
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))


def test_a_probe_on_the_gpu_measures_and_changes_nothing(job, shards, run_to_the_end):
    probe = {"data": str(shards), "every": 4, "n_samples": 24, "steps": 3, "device": DEVICE, "threads": 1}
    (plain, run), (probed, beside) = job("plain"), job("probed", probe=probe)
    assert run_to_the_end(plain) == run_to_the_end(probed) == 0
    probes = [json.loads(line) for line in (beside / "probes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in probes] == [4, 8] and all(0 <= row["robust"] <= row["clean"] for row in probes)
    assert metrics(beside) == metrics(run) and weights(beside) == weights(run)


def test_embeddings_stored_on_the_gpu_train_as_the_teacher_does(job, run_to_the_end, tmp_path):
    """To the bit: they are made with the training's batch size, and kernels repeat their bits."""
    data = {"embeddings": str(tmp_path / "embeddings")}
    live, run = job("live", data=data)
    assert run_to_the_end(live) == 0
    process_group.stop()
    cache(live, Interruption(), say=lambda *line: None)
    model = dict(live.teachers["clean"].model_dump(exclude_defaults=True), stored=True)
    read, from_disk = job("stored", data=data, teachers={"clean": model})
    assert run_to_the_end(read) == 0
    assert metrics(from_disk) == metrics(run) and weights(from_disk) == weights(run)


def test_a_row_of_metrics_says_what_the_gpu_did(job, run_to_the_end):
    config, run = job("measured")
    assert run_to_the_end(config) == 0
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["seconds"] > 0 and row["memory_gib"] > 0
    only_on_cuda("a CPU's allocator reserves nothing")
    assert row["reserved_gib"] >= row["memory_gib"]


def test_a_preflight_passes_and_names_gpu_and_driver(job, capsys, run_to_the_end):
    config, _ = job("preflight")
    assert preflight.preflight(config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["PASS"] * len(lines) and len(lines) >= 7
    (devices,) = [line for line in lines if line.startswith("PASS devices")]
    print(f"\n{devices}")
    only_on_cuda("a CPU has no driver")
    assert "GiB free; driver " in devices and "torch for CUDA" in devices


def test_a_run_on_the_cpu_leaves_the_gpu_alone(job):
    config, _ = job("on-the-cpu", engine={"device": "cpu", "precision": "float32"}, train={"steps": 2, "batch_size": 8})
    body = (
        "import json, sys, torch\n"
        "from mmtard import config\n"
        "from mmtard.distributed.interruption import Interruption\n"
        "from mmtard.training.train import train\n"
        "assert train(config.validate(json.load(sys.stdin)), Interruption()) == 0\n"
        "print('CUDA', torch.cuda.is_initialized())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body],
        input=config.model_dump_json(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "CUDA False", done.stdout + done.stderr


def test_compiled_forwards_train_as_uncompiled_ones_do(job, run_to_the_end, monkeypatch, capfd):
    only_on_cuda("compiling on a CPU takes minutes, and `engine.compile: auto` leaves it out there")
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as all other tests run
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    (off, plain), (on, compiled) = job("plain"), job("compiled", engine={"compile": "on"})
    assert run_to_the_end(off) == run_to_the_end(on) == 0
    said = capfd.readouterr().out
    assert "uncompiled" not in said and "not fused" not in said
    losses = [[row["loss"] for row in metrics(run)] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
