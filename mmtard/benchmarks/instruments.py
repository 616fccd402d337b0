"""A clock on the parts of a training step: what it asks of its engine, of its student and of its teachers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ..distillation.task import DistillationTask
from ..distributed.collectives import wrapped_collectives
from ..training.engine import Engine
from .phases import PhaseClock


def instrument(engine: Engine, clock: PhaseClock) -> None:
    """Let the clock time what a step asks of its engine."""
    attack_forward = engine.attack_forward

    @contextmanager
    def attack():
        with clock("attack"), attack_forward() as forward:
            yield forward

    engine.attack_forward = attack
    engine.backward = clock.timed("student backward", engine.backward)
    engine.end_micro_batch = clock.timed("optimiser", engine.end_micro_batch)


def instrument_task(task: DistillationTask, clock: PhaseClock) -> None:
    """Let the clock time what a task asks of its student and its teachers."""
    task.student = _Timed(task.student, clock, "student forward")
    task.teachers = {name: _Timed(teacher, clock, "teachers") for name, teacher in task.teachers.items()}


@contextmanager
def timed_collectives(clock: PhaseClock) -> Iterator[PhaseClock]:
    """Let the clock time the ranks' collectives inside the block, whichever phase they belong to."""
    with wrapped_collectives(partial(clock.timed, "communication")):
        yield clock


class _Timed:
    """Something that can be called, whose calls are part of a phase; all else is its own."""

    def __init__(self, inner, clock: PhaseClock, phase: str):
        self._inner, self._clock, self._phase = inner, clock, phase

    def __call__(self, *args, **kwargs):
        with self._clock(self._phase):
            return self._inner(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)
