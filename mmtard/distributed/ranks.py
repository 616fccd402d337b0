"""Ranks: who this process is under torchrun, the deepspeed launcher, srun or alone, and how ranks agree."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d

from ..errors import RunError, UserError
from .devices import rank_device
from .launcher import Launch, launch_from_env
from .meeting import meet, patience_of
from .processes import keep_freed_memory, raise_descriptor_limit

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
LEAVE_S = 60.0  # for NCCL to take its groups down

# A forked process (a loader) collects no garbage of its parent's: an earlier group in it would be destroyed there,
# which waits for ever for threads that a fork does not take along.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Device tensors go through the default group, flags and numbers through `cpu_group` (gloo).
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    cpu_group: Any

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each number summed over the ranks, in float64; the same on every rank."""
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, group=self.cpu_group)
        return numbers.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer."""
        return self.sum([float(flag)])[0] > 0

    def all_gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.cpu_group)
        return items

    def gather_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Every rank's numbers [n] as [world_size, n], in rank order, over the device's group.

        The host does not wait for the device. `n` must be the same on all ranks.
        """
        gathered = numbers.new_empty(self.world_size * numbers.numel())
        ALL_GATHER(gathered, numbers.contiguous())
        return gathered.view(self.world_size, numbers.numel())

    def ranks_a_node(self) -> int:
        """How many ranks a node has, where every node has as many and they follow one another; else all. Collective."""
        local = self.all_gather(self.local_rank)
        size = local.index(0, 1) if 0 in local[1:] else len(local)
        return size if local == list(range(size)) * (len(local) // size) else len(local)

    def run_on_first(self, make, patience: timedelta | None = None) -> Any:
        """`make()` of the first rank, on every rank. A UserError there is raised on all of them.

        patience: how long the others wait for it where the group's own timeout is too short for what is made.
        """
        group = dist.new_group(backend="gloo", timeout=patience) if patience else self.cpu_group
        box: list[Any] = [None]
        if self.is_first:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=group)
        if patience:
            dist.destroy_process_group(group)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def raise_together(self, error: UserError | RunError | None) -> None:
        """Raise on every rank what any of them met: the first one's error, by rank. Collective."""
        met = next((error for error in self.all_gather(error) if error is not None), None)
        if met is not None:
            raise met

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(group=self.cpu_group)


def start(device: str = "auto", timeout: timedelta = timedelta(minutes=30), *, watchdog_minutes: float = 10.0) -> Ranks:
    """Join the process group that this launch describes.

    It is RANK/WORLD_SIZE/LOCAL_RANK (torchrun, deepspeed), SLURM_PROCID/NTASKS/LOCALID (srun, with MASTER_ADDR and
    MASTER_PORT exported), or a group of one without a network. device: auto | cpu | cuda. watchdog_minutes: what
    `resume.watchdog_minutes` is, by which a rank waits for others that do not come. Raises UserError when a GPU
    is asked for, or Slurm gave some, and torch sees none, when local ranks would share a GPU, and when a launcher left
    no master address; RunError when the ranks do not meet.
    """
    # DeepSpeed and FSDP2 call them; no user can change that.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning
    )
    launch = launch_from_env()
    rank, world, local = launch.rank, launch.world_size, launch.local_rank
    if launch.tasks_left_out:
        print(
            f"mmtard: started without srun in a job of {launch.tasks_left_out} tasks, so this is one rank alone; "
            "`srun python -m mmtard ...` starts one rank a task",
            file=sys.stderr,
            flush=True,
        )
    raise_descriptor_limit()
    where = rank_device(device, local)
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        _meet(launch, where, timeout, patience_of(watchdog_minutes))
    # DeepSpeed reads these, and takes the GPU that LOCAL_RANK numbers.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(where.index if on_gpu else local))
    return Ranks(rank, world, local, where, _cpu_group(rank, world, timeout))


def _meet(launch: Launch, device: torch.device, timeout: timedelta, patience: timedelta) -> None:
    """Join the default group, NCCL's on GPUs, else gloo's. Raises UserError without an address to meet at."""
    env, on_gpu, rank, world = os.environ, device.type == "cuda", launch.rank, launch.world_size
    if world > 1 and "MMTARD_INIT_FILE" not in env and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError(
            f"{world} ranks but no MASTER_ADDR and MASTER_PORT; export both; in a batch script: "
            'eval "$(python -m mmtard.launch.environment)"'
        )
    place = _meeting_point(world)
    store = meet(place, rank, world, patience)
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("default", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except dist.DistError as error:
        raise RunError(
            f"rank {rank} of {world} did not join the others: {' '.join(str(error).split())[:300]}"
        ) from None


def _cpu_group(rank: int, world: int, timeout: timedelta) -> Any:
    """The gloo group of all ranks. Raises RunError where their network interfaces do not reach one another."""
    try:
        return dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise RunError(
            f"rank {rank} of {world} ({platform.node()}) cannot reach the others over the network: "
            f"{' '.join(str(error).split())[:300]}; name the interface that connects the nodes in GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME (`ip addr` lists them)"
        ) from None


def set_timeouts(limit: timedelta) -> None:
    """Let every process group of this process wait so long, DeepSpeed's own groups too, which torch gives 10 minutes.

    NCCL takes the whole process down at its time-out, before anything can be said or noted.
    """
    setter = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        setter(limit, group)


def peer_is_gone(error: BaseException | None) -> bool:
    """Whether an error comes from another rank that ended, or did not answer in time, rather than from this one."""
    # gloo has no exception of its own, and names the file of its transport.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/" in str(error) or "closed by peer" in str(error))
    )


def reduce(numbers: torch.Tensor) -> None:
    """Sum a tensor over the ranks in place, on their devices."""
    dist.all_reduce(numbers)


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """`start` and `stop` around a block; a lost connection leaves as a RunError of one line.

    A group that this process was in before, such as that of a program which calls mmtard, is joined and left as it is.
    """
    was_in_one = dist.is_initialized()
    ranks = start(device)
    try:
        yield ranks
    except RuntimeError as error:
        if not peer_is_gone(error):
            raise
        raise RunError(
            "lost the connection to another rank; its own lines say why, this rank saw: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    if not was_in_one:
        stop()


def stop(ranks: Ranks | None = None) -> None:
    """Leave the group, so that this process may join another; DeepSpeed forgets its own groups with it.

    NCCL's groups are left together, and within a minute or not at all: to destroy one waits for ranks that have not
    come so far, and for one that is gone. ranks: those of this process, which the first one may keep waiting.
    """
    if not dist.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm.comm")
    destroy = (comm if comm is not None and comm.cdb is not None else dist).destroy_process_group
    if ranks is None or ranks.device.type != "cuda":
        return destroy()
    try:
        ranks.barrier()
    except RuntimeError:
        pass  # a rank that ended meanwhile; what this one had to do is done
    leaving = threading.Thread(target=destroy, name="leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)


def _meeting_point(world: int) -> str:
    if "MMTARD_INIT_FILE" in os.environ:  # a shared file instead of a TCP store, for ranks on one machine
        meeting = Path(os.environ["MMTARD_INIT_FILE"])
        if (
            not os.access(meeting.parent, os.W_OK | os.X_OK) or meeting.is_dir()
        ):  # torch would try again for half an hour
            raise UserError(
                f"MMTARD_INIT_FILE: ranks cannot meet at '{meeting}'; name a file in a folder that can be written"
            )
        return f"file://{meeting}"
    if world > 1:
        return "env://"
    try:
        folder = tempfile.mkdtemp(prefix="mmtard-")
    except OSError as error:
        raise UserError(f"TMPDIR: {error.strerror}; name a folder that can be written") from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"file://{folder}/store"
