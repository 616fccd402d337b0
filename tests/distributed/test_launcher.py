"""Which rank a process takes itself for, in the environments that launchers make."""

import os

import pytest

from mmtard.distributed.launcher import Launch, launch_from_env, world_size_from_env
from mmtard.errors import UserError

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEPID": "0"}  # set by srun, and not in a batch script


@pytest.fixture
def told(monkeypatch):
    """Call with the variables of a launch, in place of those that this process has."""

    def tell(env):
        for name in [n for n in os.environ if n.startswith("SLURM_") or n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
            monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return tell


@pytest.mark.parametrize(
    "env, launch",
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Launch(5, 8, 1)),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"WORLD_SIZE": "8", "RANK": "5"}, Launch(5, 8, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", **STEP}, Launch(3, 4, 1)),
        ({"SLURM_PROCID": "0", **STEP}, Launch()),
        ({"SLURM_NTASKS": "4"}, Launch()),
        # A batch script that exports WORLD_SIZE, for programs which take the rank from Slurm.
        ({"WORLD_SIZE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", **STEP}, Launch(3, 4, 1)),
    ],
)
def test_a_process_is_the_rank_that_its_launcher_names(told, env, launch):
    told(env)
    assert launch_from_env() == launch and world_size_from_env() == launch.world_size


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_what_a_batch_script_or_an_interactive_shell_starts_without_srun_is_alone(told, step):
    """Slurm tells it that it is task 0 of 16, and no other comes."""
    told({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", **step})
    assert launch_from_env() == Launch(0, 1, 0, tasks_left_out=16)


@pytest.mark.parametrize(
    "env, words",
    [
        (
            {"WORLD_SIZE": "x"},
            "the environment says WORLD_SIZE='x', which is no number of at least 1; unset it, or start",
        ),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 and no RANK; unset it, or start through torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2; ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK='one'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4(x2)", **STEP}, "SLURM_NTASKS='4(x2)'"),
        ({"SLURM_PROCID": "x", **STEP}, "SLURM_PROCID='x'"),
    ],
)
def test_damaged_variables_of_a_launch_are_answered_by_name(told, env, words):
    told(env)
    with pytest.raises(UserError) as error:
        launch_from_env()
    assert words in str(error.value) and len(str(error.value)) < 400
