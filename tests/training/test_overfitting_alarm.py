"""The alarm for catastrophic overfitting, on a student built to be fooled by its own attack and on an honest one."""

from contextlib import contextmanager
from math import pi
from types import SimpleNamespace

import pytest
import torch

from mmtard.config import validate
from mmtard.data.samples import Batch
from mmtard.distillation.task import DistillationTask
from mmtard.errors import UserError
from mmtard.runs.metrics import SilentLogger
from mmtard.training import overfitting_alarm
from mmtard.training.overfitting_alarm import OverfittingAlarm, overfitted
from mmtard.zero_shot import ZeroShotHead

N, EPS = 24, 8 / 255
HEAD = ZeroShotHead(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 10.0)
BATCH = Batch(
    torch.full((N, 3, 8, 8), 51, dtype=torch.uint8),
    torch.zeros(N, dtype=torch.int64),
    torch.arange(N),
    torch.arange(100, 100 + N),
    [""] * N,
)


class Student:
    """Right, class 0, where `margin(x - clean)` is positive."""

    def __init__(self, margin):
        self.margin, self.forwards = margin, 0

    def __call__(self, images):
        self.forwards += 1
        m = self.margin(images - 0.2).flatten(1).mean(1)
        return torch.stack([m, torch.ones_like(m)], 1)

    @contextmanager
    def attack_forward(self):
        yield self


def wave(delta):
    """Positive at 0 and at the ball's surface, negative half way: one long step jumps over what ten short ones find."""
    return torch.cos(2 * pi * delta / EPS)


def plane(delta):
    return 0.5 + delta


def check(margin, step=100, totals=None, **attack):
    alarm, student = alarm_of(margin, totals, **attack)
    return alarm.after_step(step, BATCH), student.forwards


def alarm_of(margin, totals=None, **attack):
    settings = {"eps": "8/255", "step_size": "16/255", "steps": 1, **attack}
    config = validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "method": {"name": "tecoa"},
            "attack": settings,
            "data": {"shards": "s", "lanes": 2},
            "train": {"steps": 1, "batch_size": 2},
        }
    )
    student = Student(margin)
    ranks = SimpleNamespace(device=torch.device("cpu"), sum=totals or (lambda numbers: [float(n) for n in numbers]))
    return OverfittingAlarm(config, DistillationTask(config, student, HEAD, {}), ranks, 16, SilentLogger()), student


def test_it_goes_off_where_only_the_multi_step_attack_succeeds():
    found, _ = check(wave)
    numbers = {"one_step_accuracy": 1.0, "pgd10_accuracy": 0.0, "samples": 16}
    assert found == numbers | {"attack_steps_from_now_on": 3}
    assert check(wave, alarm_steps=None)[0] == numbers | {"remedy": overfitting_alarm.REMEDY}


def test_from_the_alarm_on_the_attack_has_more_steps_and_is_not_watched_any_more():
    alarm, student = alarm_of(wave)
    task = alarm.task
    assert (task.attack.steps, task.fell_back) == (1, False) and alarm.after_step(100, BATCH)
    task.begin_step(100)
    assert (task.attack.steps, task.attack.step_size, task.fell_back) == (3, task.attack.eps * 5 / 6, True)
    before = student.forwards
    assert alarm.after_step(200, BATCH) is None and student.forwards == before


def test_an_attack_of_no_size_sets_off_nothing_and_does_not_end_the_run():
    alarm, _ = alarm_of(wave, eps="0", step_size="1/255")
    assert alarm.after_step(100, BATCH) is None


def test_a_student_on_which_both_attacks_agree_sets_off_nothing():
    assert check(plane)[0] is None
    assert check(lambda delta: plane(delta) - 0.5 - EPS)[0] is None, "robust to neither"


def test_the_answer_is_that_of_all_ranks():
    seen = []
    found, _ = check(wave, totals=lambda numbers: seen.append(numbers) or [numbers[0] + 16, numbers[1] + 8, 32.0])
    assert seen == [[16, 0, 16]] and found is None, "8 of 32 are not below a quarter of 32"
    assert check(wave, totals=lambda numbers: [32, 7, 32])[0]["pgd10_accuracy"] == 7 / 32


def test_it_costs_nothing_between_its_steps_with_more_attack_steps_or_switched_off():
    forwards = 1 + overfitting_alarm.STEPS + 2  # the two attacks, and a look at what each made
    assert check(wave)[1] == forwards and check(wave, step=14, alarm_every=7)[1] == forwards
    assert [check(wave, **case)[1] for case in ({"step": 99}, {"steps": 2}, {"alarm_every": None})] == [0, 0, 0]


# 95 % intervals of 16 and 3 in 16: (0.806, 1), (0.066, 0.430); of 4 and 0 in 8: (0.215, 0.785), (0, 0.324)
@pytest.mark.parametrize(
    "single,multi,n,ratio,expected",
    [
        (16, 3, 16, 0.25, True),
        (16, 4, 16, 0.25, False),
        (4, 0, 8, 0.25, False),
        (16, 3, 16, 0.1, False),
        (0, 0, 16, 0.25, False),
    ],
)
def test_both_a_small_share_and_intervals_apart_are_needed(single, multi, n, ratio, expected):
    assert overfitted(single, multi, n, ratio) is expected


def test_a_ratio_above_one_is_refused():
    with pytest.raises(UserError, match="attack.alarm_ratio"):
        check(wave, alarm_ratio=1.5)


def test_samples_without_a_label_do_not_count(monkeypatch):
    monkeypatch.setattr(BATCH, "labels", torch.tensor([0, -1] * (N // 2)))
    found, _ = check(wave, objective="kl_self")
    assert (found["one_step_accuracy"], found["pgd10_accuracy"], found["samples"]) == (1.0, 0.0, 8)
