"""The works of a plan on this machine, one after another, each as processes that meet at a file."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.processes import die_with_parent

OTHERS_TURN_S = 30  # for the other ranks to end by themselves after one that ended badly


def run(python: str, words: tuple[str, ...], code: Path, world: int) -> int:
    """`python -m mmtard WORDS` as `world` ranks with `code` first on their path; the exit status.

    It is EXIT_REQUEUE where any rank ended with that, else the first rank's that is not 0, of a signal as 128 + its
    number. Signals are passed on. A rank that ends badly takes the others with it. A launcher that is killed leaves
    no rank behind: each is told to save its state and end.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in Interruption.heeded()}
    processes = []
    try:
        with tempfile.TemporaryDirectory(prefix="mmtard-") as meet:
            for rank in range(world):
                own = {
                    "RANK": rank,
                    "WORLD_SIZE": world,
                    "LOCAL_RANK": rank,
                    "MMTARD_INIT_FILE": f"{meet}/store",
                    "PYTHONSAFEPATH": 1,
                }
                env = {"OMP_NUM_THREADS": "1", **os.environ, **{k: str(v) for k, v in own.items()}}
                env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
                # Their own group: Ctrl-C comes once, from here, and not also from the terminal.
                command, told = [python, "-m", "mmtard", *words], partial(die_with_parent, os.getpid(), signal.SIGTERM)
                processes.append(subprocess.Popen(command, env=env, process_group=0, preexec_fn=told))
            return _watch(processes, received)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[subprocess.Popen], received: list[int]) -> int:
    end = None
    while True:
        while received:
            number = received.pop(0)
            for process in processes:
                process.send_signal(number)
        statuses = [process.poll() for process in processes]
        if None not in statuses or (end is not None and time.monotonic() > end):
            break
        if end is None and any(statuses):
            end = time.monotonic() + OTHERS_TURN_S
        time.sleep(0.2)
    # A rank that was killed leaves it to the others to say whether the run can be started again.
    bad = [EXIT_REQUEUE] if EXIT_REQUEUE in statuses else [s for s in statuses if s]
    return 0 if not bad else bad[0] if bad[0] > 0 else 128 - bad[0]
