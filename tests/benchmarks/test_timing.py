"""How variants are timed: alternately, with a median and a spread."""

import pytest
import torch

from mmtard.benchmarks.phases import PhaseClock
from mmtard.benchmarks.timing import Spread, alternately, ratios

CPU = torch.device("cpu")


def test_every_round_runs_every_variant_and_every_other_one_backwards():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = alternately(variants, 2, CPU, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_taken_within_a_round_and_a_spread_names_its_ends():
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]
    spread = Spread.of([3.0, 1.0, 8.0])
    assert (spread.median, spread.low, spread.high) == (3.0, 1.0, 8.0) and str(spread) == "3 (1-8)"
    assert spread.in_two_lines == "3\n1-8" and Spread.of([0.5]).in_two_lines == "0.5"


def test_a_phase_inside_another_counts_to_the_outer_one(monkeypatch):
    now = iter([0.0, 5.0, 7.0, 8.0])
    monkeypatch.setattr("mmtard.benchmarks.phases.time.perf_counter", lambda: next(now))
    clock = PhaseClock(CPU)
    with clock("attack"), clock("teachers"):
        pass
    clock.timed("optimiser", lambda: None)()
    assert clock.seconds() == pytest.approx({"attack": 5.0, "optimiser": 1.0})
    assert clock.seconds() == {}
