"""Submit the work of a job that may not be requeued as another: a script with its arguments, or a submitit folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ..distributed import slurm
from ..files import write_text
from .requeue import outside

# Options of the job that the script's own lines may not have: variable of the job -> flag of sbatch.
SHAPE = {
    "SLURM_JOB_NAME": "job-name",
    "SLURM_JOB_NUM_NODES": "nodes",
    "SLURM_JOB_ACCOUNT": "account",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_JOB_QOS": "qos",
    "SLURM_JOB_RESERVATION": "reservation",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_GPUS_PER_NODE": "gpus-per-node",
    "SLURM_ARRAY_TASK_ID": "array",
}
# The same for fields of `scontrol show job`.
FIELDS = {
    "StdOut": "output",  # the log goes on in the file that is being watched
    "TimeLimit": "time",
    "ReqNodeList": "nodelist",
    "ExcNodeList": "exclude",
    "Features": "constraint",
}


def submit_script_again(script: str, arguments: list[str]) -> str:
    """Submit a job's script with its arguments anew, with the options that this job got; the new job's id.

    Raises RuntimeError with sbatch's words when it refuses.
    """
    fields = slurm.job_fields(slurm.job())
    options = [f"--{flag}={os.environ[name]}" for name, flag in SHAPE.items() if os.environ.get(name)]
    options += [
        f"--{flag}={fields[name]}" for name, flag in FIELDS.items() if fields.get(name, "(null)") not in ("", "(null)")
    ]
    if fields.get("OverSubscribe") == "YES":
        options.append("--oversubscribe")
    # Slurm knows a task of an array by the job's own number, too.
    number = _sbatch(os.environ["SLURM_JOB_ID"], [*options, script, *arguments])
    return _name(number)


def submit_folder_again(folder: Path) -> str:
    """Submit this job of a submitit folder (scripts, works, logs) anew; the new job's id.

    Raises RuntimeError with sbatch's words when it refuses.
    """
    env, job = os.environ, slurm.job()
    first, task = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"]), env.get("SLURM_ARRAY_TASK_ID")
    text = (folder / f"{first}_submission.sh").read_text()
    for pattern, value in (("%j", job), ("%A", first), ("%a", task or "")):
        text = text.replace(pattern, value)  # the log goes on in the files that are being watched
    number = _sbatch(job, [f"--array={task}"] if task else [], text)
    new = _name(number)
    write_text(folder / f"{number}_submission.sh", text)
    shutil.copyfile(folder / f"{job}_submitted.pkl", folder / f"{new}_submitted.pkl")
    write_text(successor(folder, job), new)  # at once: who follows the log may be looking
    return new


def successor(folder: Path, job: str) -> Path:
    """The file that names the job which goes on for `job`; absent while there is none."""
    return folder / f"{job}_goes_on_as"


def _sbatch(after: str, words: list[str], text: str | None = None) -> str:
    """sbatch of a script in `words`, or of `text`, to begin when job `after` has ended; the new job's number."""
    command = ["sbatch", "--parsable", f"--dependency=afterany:{after}", "--no-requeue", *words]
    env = outside() | {"MMTARD_SUBMITTED_AGAIN": str(slurm.starts())}
    done = subprocess.run(command, input=text or "", env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split()))
    return done.stdout.strip().partition(";")[0]


def _name(number: str) -> str:
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{number}_{task}" if task else number
