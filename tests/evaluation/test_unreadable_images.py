"""Images that cannot be read are in no number of an evaluation, and too many end it."""

import re

import pytest
from tiny_datasets import write

from mmtard.attacks import ensemble
from mmtard.distributed.interruption import Interruption
from mmtard.errors import RunError, UserError
from mmtard.training import probe_process as probe

UNREADABLE = (3, 40, 41, 42)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """400 samples, 4 of which cannot be read, as many as may be: three in one chunk of 3."""
    return write(tmp_path_factory.mktemp("damaged") / "colours", 400, size=(8, 8), truncated=UNREADABLE)


def test_an_image_that_cannot_be_read_is_in_no_number(damaged, measure, tmp_path):
    """A neighbour's image would be counted twice, and pass every check."""
    found = measure(damaged, attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    (whole,) = measure(write(tmp_path / "whole", 400, size=(8, 8)), tmp_path / "other", attacks=("pgd",), iters=1)[
        "datasets"
    ]

    def per_sample(e):
        s = e["samples"]
        return {
            key: outcome for key, *outcome in zip(s["keys"], s["labels"], s["clean"], s["eps"]["4/255"]["broken_by"])
        }

    assert per_sample(entry) == {key: v for key, v in per_sample(whole).items() if int(key[1:]) not in UNREADABLE}
    ns = (
        entry["n_total"],
        entry["clean_all"]["n"],
        entry["clean"]["n"],
        entry["eps"]["4/255"]["robust"]["n"],
        entry["left_out"],
    )
    assert ns == (396, 396, 396, 396, 4) and (whole["n_total"], whole["left_out"]) == (400, 0)
    (line,) = [line for line in entry["health"] if line["check"] == "every image was read"]
    told = r"4 of 400 are left out of every number: 0.tar/s0003: cannot be decoded: .*; 0.tar/s0040: .*; \.\.\."
    assert line["status"] == "WARN" and re.fullmatch(told, line["detail"])
    assert "every image was read" not in {line["check"] for line in whole["health"]}


def test_a_sample_of_the_readable_is_the_same_in_other_chunks_and_after_an_interruption(
    damaged, measure, tmp_path, monkeypatch
):
    asked = {"attacks": ("pgd",), "iters": 1, "n_samples": 50}
    (whole,) = measure(damaged, tmp_path / "whole", **asked)["datasets"]
    assert len(whole["samples"]["ids"]) == 50 and not set(UNREADABLE) & set(whole["samples"]["ids"])
    interruption, run = Interruption(), ensemble.run_attacks
    monkeypatch.setattr(ensemble, "run_attacks", lambda *args: setattr(interruption, "signal", "SIGTERM") or run(*args))
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        measure(damaged, batch_size=3, interruption=interruption, **asked)
    monkeypatch.setattr(ensemble, "run_attacks", run)
    (entry,) = measure(damaged, batch_size=3, **asked)["datasets"]
    assert entry["samples"] == whole["samples"] and entry["clean_all"] == whole["clean_all"] and entry["left_out"] == 4
    assert [line for line in entry["health"] if line["check"] == "every image was read"] == whole["health"][:1]


@pytest.mark.parametrize("n, truncated", [(48, range(10)), (400, range(5)), (2, range(2))])
def test_too_many_that_cannot_be_read_end_it(measure, tmp_path, n, truncated):
    folder = write(tmp_path / "colours", n, size=(8, 8), truncated=truncated)
    told = (
        f"colours clean: {len(truncated)} of {n} samples cannot be read, and 1 % may be left out "
        ".0.tar/s0000: cannot be decoded: .*; repair or remove them"
    )
    with pytest.raises(UserError, match=told):
        measure(folder, attacks=("pgd",), iters=1)


@pytest.mark.slow
def test_a_probe_leaves_out_what_cannot_be_read(damaged, exported, ranks):
    asked = {
        "eps": "4/255",
        "norm": "linf",
        "steps": 1,
        "checkpoint": str(exported),
        "ema": False,
        "device": "cpu",
        "batch_size": 3,
    }
    found = probe.measure({**asked, "data": {"shards": str(damaged / "test")}, "n_samples": 400})
    assert (found["clean"]["n"], found["robust"]["n"]) == (396, 396)
    with pytest.raises(UserError, match="probe.data: 4 of 400 samples cannot be read, and 0.5 % may be left out"):
        probe.measure({**asked, "data": {"shards": str(damaged / "test"), "max_replaced": "1/200"}, "n_samples": 400})
