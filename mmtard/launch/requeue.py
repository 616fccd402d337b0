"""A job that may not be requeued goes on as another: the same script, after this job has ended, with the same logs and results' folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ..distributed import slurm
from ..distributed.processes import RANK_VARIABLES


def outside() -> dict[str, str]:
    """This environment without the shape and the ranks of the job it may belong to, which sbatch would take for the new one's."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in RANK_VARIABLES and not k.startswith(("SLURM_", "SRUN_", "SBATCH_", "SUBMITIT_"))
    }
    return kept | {k: v for k, v in os.environ.items() if k == "SLURM_CONF"}


def submit_again(folder: Path) -> str:
    """Submit this job's script anew, to start when this job has ended; the new job's id.

    folder: where submitit keeps scripts, works and logs. Own jobs that wait for this one are made to wait for the new one.
    Raises RuntimeError with sbatch's words when it refuses.
    """
    env, job = os.environ, slurm.job()
    first, task = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"]), env.get("SLURM_ARRAY_TASK_ID")
    # The log goes on in the files that are being watched.
    text = (
        (folder / f"{first}_submission.sh")
        .read_text()
        .replace("%j", job)
        .replace("%A", first)
        .replace("%a", task or "")
    )
    command = [
        "sbatch",
        "--parsable",
        f"--dependency=afterany:{job}",
        "--no-requeue",
        *([f"--array={task}"] if task else []),
    ]
    done = subprocess.run(
        command,
        input=text,
        env=outside() | {"MMTARD_SUBMITTED_AGAIN": str(slurm.starts())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split()))
    number = done.stdout.strip().partition(";")[0]
    new = f"{number}_{task}" if task else number
    (folder / f"{number}_submission.sh").write_text(text)
    shutil.copyfile(folder / f"{job}_submitted.pkl", folder / f"{new}_submitted.pkl")
    successor(folder, job).write_text(new)
    slurm.hand_over(job, new)
    return new


def successor(folder: Path, job: str) -> Path:
    """The file that names the job which goes on for `job`; absent while there is none."""
    return folder / f"{job}_goes_on_as"
