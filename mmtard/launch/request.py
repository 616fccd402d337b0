"""What a job asks Slurm for, in numbers and names; without submitit."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from ..errors import UserError

DEFAULT_CONFIG = "configs/vitb32_mmtard.yaml"


@dataclass(frozen=True)
class JobRequest:
    """What a job asks Slurm for."""

    python: str
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int = 12
    minutes: int = 24 * 60
    lead: int = 120  # seconds between the signal and the end
    exclusive: bool = True
    mem: str | None = None
    at_once: int = 256  # jobs of an array
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: str | None = None  # a file that the job's shell sources before Python starts
    srun: tuple[str, ...] = ()  # words after srun's own flags
    more: dict[str, str | bool] = field(default_factory=dict)

    @property
    def tasks_per_node(self) -> int:
        """One a GPU; one on a node that is used without GPUs."""
        return max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.tasks_per_node


def words_of(text: str, where: str) -> tuple[str, ...]:
    """The words of a text as a shell splits them. Raises UserError, which names `where` it stands, for open quotes."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{where}: '{text}' is not a list of words: {error}") from None


def minutes(time: str) -> int:
    """Minutes of a time limit in any of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Seconds count as a minute begun. Raises UserError for any other text, and for no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", time)
    if match:
        days, day_h, day_m, day_s, h, m, s, alone = (int(g or 0) for g in match.groups())
        total = 60 * (24 * days + day_h + h) + day_m + m + alone + -(-(day_s + s) // 60)
        if total:
            return total
    raise UserError(f"--time: '{time}' is not a time limit; write minutes, H:MM:SS or D-HH:MM:SS")
