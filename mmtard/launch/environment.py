"""What the ranks of a Slurm job are told: where they meet, and how they behave.

    exports=$(python -m mmtard.launch.environment) || exit
    eval "$exports"

sets it in the shell of a job. Needs the standard library alone.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from ..distributed import slurm
from ..errors import UserError

# Below the range that connections take their ports from, and above what services use.
FIRST_PORT, PORTS = 10000, 20000
TRIES, STRIDE = 50, 997  # the ports of jobs with neighbouring numbers are left to those jobs


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that the ranks of the job described by `env` need beside Slurm's own.

    Raises UserError where `env` is not that of a Slurm job, and where Slurm does not name its nodes.
    """
    if not env.get("SLURM_JOB_ID", "").isdecimal() or not env.get("SLURM_JOB_NODELIST"):
        raise UserError("SLURM_JOB_ID: this is no job of Slurm; submit the script with sbatch")
    first = _first_node(env["SLURM_JOB_NODELIST"])
    return {
        "MASTER_ADDR": _address(first),
        "MASTER_PORT": str(_port(int(env["SLURM_JOB_ID"]), here=env.get("SLURMD_NODENAME", first) == first)),
        # srun does not inherit --cpus-per-task since Slurm 22.05, and would give each rank one core.
        "SRUN_CPUS_PER_TASK": env.get("SLURM_CPUS_PER_TASK") or "1",
        # Where the job itself was submitted with --export=NONE, srun would keep these variables from the ranks.
        "SLURM_EXPORT_ENV": "ALL",
        # A rank's work on the CPU is decoding, in loader processes; more threads would fight for the same cores.
        "OMP_NUM_THREADS": "1",
        # Says why NCCL could not connect, and nothing when it could. Where it picked the wrong network of the nodes,
        # also export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with the right one's name (`ip -brief addr` lists them).
        "NCCL_DEBUG": env.get("NCCL_DEBUG") or "WARN",
        # A line in the log as soon as it is printed, and a traceback from a rank that crashes in native code.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def announcement(env: Mapping[str, str], more: str = "") -> str:
    """The first line of each start in a job's log, from the environment with `rendezvous` in it."""
    place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    return f"start {slurm.starts()} on {env['SLURM_JOB_NODELIST']}, ranks meet at {place}{more}"


def say(text: str, job: str | None = None, file: TextIO | None = None) -> None:
    """Print a line of a job's log, on stdout unless `file` says otherwise, with the time and the job."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} job {job or slurm.job()}: {text}", file=file or sys.stdout, flush=True)


def _first_node(nodes: str) -> str:
    names = _ask("scontrol", "show", "hostnames", nodes).split()
    if names:
        return names[0]
    if "[" not in nodes and "," not in nodes:
        return nodes
    raise UserError(f"SLURM_JOB_NODELIST: 'scontrol show hostnames {nodes}' names no node; is scontrol on the PATH?")


def _address(node: str) -> str:
    """The address that Slurm itself reaches a node by, since its name may not resolve; the name where there is none."""
    words = _ask("scontrol", "show", "node", "--oneliner", node).split()
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), "") or node


def _port(job: int, here: bool) -> int:
    """A port for each job, since jobs may share a node: the job's own one, or the next that nobody listens on.

    here: whether the ranks meet on this machine, so that it can be asked.
    """
    ports = [FIRST_PORT + (job + n * STRIDE) % PORTS for n in range(TRIES if here else 1)]
    return next((port for port in ports if not here or _is_free(port)), ports[0])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As torch's own store listens: what an ended job left in TIME_WAIT does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main() -> int:
    """Print `export` lines for the shell of a job on stdout, and the first line of its log on stderr."""
    try:
        variables = rendezvous(os.environ)
    except UserError as error:
        print(f"mmtard: {error}", file=sys.stderr)
        return 2
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    say(announcement({**os.environ, **variables}), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
