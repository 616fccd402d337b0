"""The checks of a preflight that concern the machines: software, GPUs, network, and what loaders need of a node."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections import Counter

import torch

from ..data.images import Transform
from ..data.limits import SHARED_MEMORY, free_shared_memory, loader_bytes, raise_file_limit
from ..distributed.gpu_driver import LEAST_DRIVER, driver_version, why_too_old
from ..distributed.ranks import reduce
from ..runs.environment import PACKAGES, installed_version
from .preflight_check import Bench, Check, CheckFailed

FREE_SHARE = 0.9  # of a GPU's memory: less free, beside what this process takes, and somebody else is on it
OWN_BYTES = 3 * 2**29  # of the CUDA context, cuBLAS and NCCL, whatever the GPU's size
REDUCED_MIB, REDUCED_TIMES = 64, 5


class Versions(Check):
    """The same Python and packages everywhere."""

    name = "versions"

    def measure(self, bench: Bench) -> dict:
        """The versions here."""
        packages = {name: installed_version(name) for name in PACKAGES}
        return {"python": platform.python_version(), "cuda": torch.version.cuda, **packages}

    def verdict(self, bench: Bench, found: list[dict]) -> str:
        """The versions, which must be the same on all ranks."""
        first = found[0]
        other = {
            f"{k} is {own[k]} on rank {r} and {first[k]} on rank 0"
            for r, own in enumerate(found)
            for k in own
            if own[k] != first[k]
        }
        if other:
            raise CheckFailed(f"{'; '.join(sorted(other)[:4])}; use one environment on all nodes")
        packages = f"torch {first['torch']}, deepspeed {first['deepspeed']}"
        return f"python {first['python']}, {packages}, the same on {len(found)} ranks"


class Devices(Check):
    """Each GPU computes rightly and is free."""

    name = "devices"

    def measure(self, bench: Bench) -> tuple[str, str | None]:
        """(what this rank computes on, its driver); CheckFailed when its GPU is taken, faulty or wrong."""
        device, driver = bench.ranks.device, driver_version()
        if device.type == "cpu":
            return self._cpu(bench.config.engine.device, driver), None
        self._is_free(device)
        # Whole numbers this small are exact in any order of summation.
        a, b = (
            torch.randint(-8, 8, (2048, 2048), generator=torch.Generator().manual_seed(seed)).float() for seed in (0, 1)
        )
        if not torch.equal((a.to(device) @ b.to(device)).cpu(), a @ b):
            raise CheckFailed(f"a product of whole numbers came out wrong on {device}; have the node checked")
        errors = _memory_errors(torch.cuda.get_device_properties(device).uuid)
        if errors:
            raise CheckFailed(
                f"{device} had {errors} uncorrected memory errors since the node started; have the node checked"
            )
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        # Its peak is not known, so `mfu` is left out.
        part = " (a slice of a GPU, MIG: one for each rank, no mfu)" if "MIG" in name else ""
        return f"{name}{part}, {free / 2**30:.0f} GiB free", driver

    def _cpu(self, asked: str, driver: str | None) -> str:
        too_old = why_too_old(torch.version.cuda, driver) if asked != "cpu" else None
        if too_old:
            raise CheckFailed(f"torch sees no GPU: {too_old}; engine.device=cpu leaves the GPU alone")
        why = "as asked for" if asked == "cpu" else "no GPU here"
        return f"CPU, {torch.get_num_threads()} threads a rank ({why})"

    def _is_free(self, device: torch.device) -> None:
        free, total = torch.cuda.mem_get_info(device)
        if total - free > (1 - FREE_SHARE) * total + OWN_BYTES:
            raise CheckFailed(
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of {device} are free, another program is on it "
                "(nvidia-smi names it): end that one, or take another GPU"
            )

    def verdict(self, bench: Bench, found: list[tuple[str, str | None]]) -> str:
        """The devices and their drivers."""
        names = [name for name, _ in found]
        devices = "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        drivers = sorted({driver for _, driver in found if driver})
        if not drivers:
            return devices
        least = LEAST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), "?")
        return f"{devices}; driver {', '.join(drivers)}, torch for CUDA {torch.version.cuda} ({least} or newer)"


class Limits(Check):
    """The loaders of all ranks of a node find room in its shared memory, and files enough."""

    name = "limits"

    def measure(self, bench: Bench) -> tuple[str, int, int | None, int]:
        """(node, files that may be open, bytes free in its shared memory, bytes that this rank's loaders take)."""
        config = bench.config
        share = config.train.batch_size // bench.ranks.world_size
        taken = loader_bytes(config.data.workers, share * 3 * math.prod(Transform(bench.image_size).shape))
        return platform.node(), raise_file_limit(), free_shared_memory(), taken

    def verdict(self, bench: Bench, found: list[tuple[str, int, int | None, int]]) -> str:
        """The least of what the nodes allow; no node's loaders may take more than it has."""
        taken: Counter[str] = Counter()
        for node, _, _, of_rank in found:
            taken[node] += of_rank
        free = {node: shared for node, _, shared, _ in found if shared is not None}
        for node, shared in free.items():
            if shared < taken[node]:
                raise CheckFailed(
                    f"{SHARED_MEMORY} of {node} has {shared / 2**30:.3g} GiB free, and the loaders of its ranks take "
                    f"up to {taken[node] / 2**30:.3g} GiB; give the container more (docker run --shm-size), or lower "
                    f"data.workers (now {bench.config.data.workers})"
                )
        least = min(free.values(), default=0) / 2**30
        most = f"loaders take up to {max(taken.values()) / 2**30:.3g} of {least:.3g} GiB of {SHARED_MEMORY} on a node"
        return f"{most if free else f'no {SHARED_MEMORY} here'}; a rank may open {min(n for _, n, _, _ in found)} files"


class Network(Check):
    """Every rank reaches the others, and how fast."""

    name = "network"

    def measure(self, bench: Bench) -> tuple[bool, float]:
        """(whether a sum over the ranks is right, seconds of one)."""
        numbers = torch.ones(REDUCED_MIB * 2**18, device=bench.ranks.device)
        reduce(numbers)
        right = bool((numbers == bench.ranks.world_size).all())
        bench.ranks.barrier()
        began = time.monotonic()
        for _ in range(REDUCED_TIMES):
            reduce(numbers)
        numbers[0].item()  # waits for the GPU
        return right, (time.monotonic() - began) / REDUCED_TIMES

    def verdict(self, bench: Bench, found: list[tuple[bool, float]]) -> str:
        """How fast a sum over the ranks is, which must be right on each of them."""
        world = len(found)
        wrong = [r for r, (right, _) in enumerate(found) if not right]
        if wrong:
            raise CheckFailed(f"a sum over {world} ranks came out wrong on ranks {wrong}; have the network checked")
        if world == 1:
            return "one rank, none to reach"
        rate = REDUCED_MIB / 1024 / max(seconds for _, seconds in found) * 2 * (world - 1) / world
        return f"{world} ranks reach each other, all-reduce of {REDUCED_MIB} MiB at {rate:.3g} GiB/s of bus bandwidth"


def _memory_errors(uuid) -> int:
    ask = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        "--query-gpu=ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
    ]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return int(told) if told.isdigit() else 0  # "[N/A]" for a GPU that does not count them
