"""The ranks of a study on this machine: processes that take one work after another and end with their parent."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..distributed.interruption import EXIT_REQUEUE
from ..distributed.processes import RANK_VARIABLES
from ..resources import PACKAGE

OTHERS_TURN_S = 30  # for the other ranks to answer after one that failed


@dataclass
class Rank:
    """A worker process, what it reads, and where its answers come."""

    process: subprocess.Popen
    answers: int
    text: bytes = b""


@dataclass
class Team:
    """`ranks` worker processes that do the same works together; started when they are first asked."""

    file: Path  # of the study
    ranks: int
    threads: int
    members: list[Rank] = field(default_factory=list)

    def start(self) -> None:
        """Start the processes, unless they are there."""
        if not self.members:
            self.members = [self._start(rank) for rank in range(self.ranks)]

    def ask(self, work: dict) -> tuple[int, str]:
        """Have a work done by all; (exit status, why it is not 0).

        After a work that failed, and where a process was lost, the next one is done by processes that are started anew:
        what a failed work leaves open, such as its ranks' group, would be the next one's.
        """
        if any(member.process.poll() is not None for member in self.members):
            self.end(0)
        self.start()
        with tempfile.TemporaryDirectory(prefix="mmtard-") as meet:
            line = json.dumps({**work, "meet": f"{meet}/store"}) + "\n"
            for member in self.members:
                with suppress(BrokenPipeError):
                    member.process.stdin.write(line.encode())
                    member.process.stdin.flush()
            found = self._answers()
        failed = next((one for one in found if one[0]), None)
        if failed:
            self.end(5)
        return failed or (0, "")

    def terminate(self) -> None:
        """Ask the processes to save what they are at, and to end."""
        for member in self.members:
            if member.process.poll() is None:
                member.process.terminate()

    def end(self, patience: float) -> None:
        """End the processes: with the last line they read, or after `patience` seconds by force."""
        for member in self.members:
            with suppress(OSError):
                member.process.stdin.close()
        for member in self.members:
            try:
                member.process.wait(patience)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            os.close(member.answers)
        self.members = []

    def _start(self, rank: int) -> Rank:
        read, write = os.pipe()
        env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        env |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONSAFEPATH": "1"}
        env.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow each other down on shared cores
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        if self.ranks > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank)}
        words = [sys.executable, "-m", "mmtard.study.worker", str(os.getpid()), str(self.file), str(write)]
        process = subprocess.Popen(
            words, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write], process_group=0
        )
        os.close(write)
        return Rank(process, read)

    def _answers(self) -> list[tuple[int, str]]:
        """Each rank's answer, what failed for a reason of its own first."""
        waiting, found = {member.answers: member for member in self.members}, []
        while waiting:
            failed = any(status for status, _ in found)
            ready, _, _ = select.select(list(waiting), [], [], OTHERS_TURN_S if failed else None)
            for number in ready or list(waiting):
                member = waiting[number]
                piece = os.read(number, 65536) if ready else b""
                member.text += piece
                if not piece or b"\n" in member.text:
                    del waiting[number]
                    found.append(self._answer(member))
        return sorted(found, key=lambda one: one[0] == EXIT_REQUEUE)

    def _answer(self, member: Rank) -> tuple[int, str]:
        line, end, member.text = member.text.partition(b"\n")
        if end:
            found = json.loads(line)
            return found["status"], found["message"]
        with suppress(subprocess.TimeoutExpired):
            member.process.wait(1)
        member.process.kill()
        return 1, f"its process ended with status {member.process.wait()}"
