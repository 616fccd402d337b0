"""Where each rank of a run is: a small file a rank, refreshed while its process lives, that the others read."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from ..files import note_text
from ..runs.layout import HEARTBEATS

PHASES = ("set-up", "data", "update", "agreement", "checkpoint")  # of a step, in their order


class Heartbeat:
    """The report of one rank in RUN/.heartbeat/rank-N.json, and those of the others.

    A report says host, process, step, phase, a `beat` that counts up, what the rank `said` that it met (kind of end,
    reason), and whether it `left` after its work was done.
    """

    def __init__(self, run: Path, rank: int, world_size: int):
        self.run, self.rank, self.world_size = run, rank, world_size
        self.place = (0, PHASES[0])
        self.said: tuple[str, str | None] | None = None
        self.left = False
        self._beat = 0
        self._writing = threading.Lock()

    def write(self) -> None:
        """Refresh this rank's report, on a full disk over the old one. An absent disk is left to the checkpoint."""
        with self._writing:
            self._beat += 1
            try:
                (self.run / HEARTBEATS).mkdir(exist_ok=True)
                note_text(self._path(self.rank), json.dumps(self.report()), sync=False)
            except OSError:
                pass

    def report(self) -> dict[str, Any]:
        """This rank's report."""
        step, phase = self.place
        own = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "pid_space": _pid_space()}
        return own | {"step": step, "phase": phase, "beat": self._beat, "said": self.said, "left": self.left}

    def of(self, rank: int) -> dict[str, Any]:
        """The last report of another rank; of one that never came so far, one without a host."""
        unknown = {"rank": rank, "host": "?", "pid": "?", "pid_space": None, "step": 0, "phase": PHASES[0], "beat": 0}
        unknown |= {"said": None, "left": False}
        try:
            known = json.loads(self._path(rank).read_bytes())
        except (OSError, ValueError, RecursionError):
            return unknown
        whole = isinstance(known, dict) and isinstance(known.get("step"), int) and known.get("phase") in PHASES
        return unknown | known if whole else unknown

    def others(self) -> dict[int, dict[str, Any]]:
        """Rank -> last report, of every rank but this one."""
        return {rank: self.of(rank) for rank in range(self.world_size) if rank != self.rank}

    def neighbour(self) -> dict[str, Any]:
        """The last report of the next rank, around the ring: each rank is watched by one, whatever their number."""
        return self.of((self.rank + 1) % self.world_size)

    def _path(self, rank: int) -> Path:
        return self.run / HEARTBEATS / f"rank-{rank}.json"


def is_gone(report: dict[str, Any]) -> bool:
    """Whether the process of a report has ended, where this process can tell: on the same host, by the same numbers."""
    if report["host"] != socket.gethostname() or report["pid_space"] != _pid_space() or report["pid_space"] is None:
        return False
    try:
        os.kill(int(report["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return _is_zombie(int(report["pid"]))


def in_words(reports: list[dict[str, Any]]) -> str:
    """`rank 3 (node2, process 7, last heard of in the update of step 9)`, of the first four."""
    words = [
        f"rank {r['rank']} ({r['host']}, process {r['pid']}, last heard of in the {r['phase']} of step {r['step']})"
        for r in reports[:4]
    ]
    return ", ".join(words) + (f" and {len(reports) - 4} more" if len(reports) > 4 else "")


def order(report: dict[str, Any]) -> tuple[int, int]:
    """How far a rank has come."""
    return report["step"], PHASES.index(report["phase"])


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and its parent has not yet asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def _pid_space() -> str | None:
    """What tells the process numbers of one container from those of another on the same host."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
