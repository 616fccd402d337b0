"""Who a process takes itself for, and the device it takes, from what Slurm sets and torch sees; no GPU is touched."""

import gc
import os
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mmtard.data import loader as data_loader
from mmtard.distributed import devices, ranks
from mmtard.errors import RunError, UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MMTARD_INIT_FILE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def start(monkeypatch):
    """Call with the number of GPUs that torch sees and the environment of a launch: `start`, whose ranks meet nobody.

    The environment is put back afterwards.
    """
    before = dict(os.environ)

    def call(gpus, device="auto", **env):
        for name in [name for name in os.environ if name in LAUNCHED or name.startswith("SLURM_")]:
            del os.environ[name]
        os.environ.update(env)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(ranks, "meet", lambda *args: dist.HashStore())
        monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
        monkeypatch.setattr(dist, "new_group", lambda *args, **kwargs: None)
        return ranks.start(device)

    yield call
    os.environ.clear()
    os.environ.update(before)


MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
BATCH_STEP = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_GPUS": "3",
    "SLURM_GPUS_ON_NODE": "1",
}  # of a script with --gpus-per-node=1 and no more


def task(local, gpus):
    """What srun tells one of the tasks of a node on which the step has so many GPUs."""
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(local),
        "SLURM_LOCALID": str(local),
        "SLURM_NTASKS": "4",
        "SLURM_GPUS_ON_NODE": str(gpus),
        **MET,
    }


def test_a_script_that_asks_for_no_tasks_is_the_only_rank(start):
    ranks = start(1, **BATCH_STEP)
    assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, torch.device("cuda", 0))


def test_a_process_that_a_batch_script_starts_without_srun_says_that_it_is_alone(start, capsys):
    ranks = start(0, SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_LOCALID="0", SLURM_JOB_ID="7", **MET)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmtard: started without srun in a job of 16 tasks, so this is one rank alone; `srun python")


def test_a_task_that_sees_all_gpus_of_its_node_takes_that_of_its_local_rank(start):
    assert start(4, **task(3, gpus=4)).device == torch.device("cuda", 3)
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("local", [0, 3])
def test_a_task_that_sees_the_gpu_of_its_own_alone_takes_it(start, local):
    """--gpus-per-task=1, --gpu-bind=single:1"""
    ranks = start(1, **task(local, gpus=4))
    assert (ranks.rank, ranks.device) == (local, torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0"  # by which DeepSpeed numbers the GPU


@pytest.mark.parametrize(
    "launch",
    [
        task(1, gpus=1),  # --gpus-per-node=1 --ntasks-per-node=2
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MET},
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            **task(0, gpus=4),
        },  # torchrun in a task that sees one of the GPUs
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused(start, launch):
    with pytest.raises(UserError, match="local rank 1 has no GPU of its own: torch sees 1; start one process a GPU"):
        start(1, **launch)


@pytest.mark.parametrize(
    "name, value", [("SLURM_JOB_GPUS", "0"), ("SLURM_GPUS_ON_NODE", "8"), ("SLURM_STEP_GPUS", "0,1")]
)
def test_gpus_that_slurm_gave_and_torch_does_not_see_are_not_passed_over(start, name, value):
    with pytest.raises(
        UserError,
        match=f"'auto' finds no GPU on .* Slurm gave this job some .{name}={value}.* or set engine.device=cpu",
    ):
        start(0, **{name: value})
    assert start(0, "cpu", **{name: value}).device.type == "cpu"


@pytest.mark.parametrize("device, env", [("cuda", {}), ("auto", {"SLURM_JOB_GPUS": "0"})])
def test_where_the_driver_is_too_old_the_remedy_is_that(start, monkeypatch, device, env):
    monkeypatch.setattr(devices, "driver_version", lambda: "535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        UserError, match="the driver 535.104.05 is older than 580, which CUDA 13.0 needs; update it, or"
    ):
        start(0, device, **env)


@pytest.mark.parametrize("env", [{}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {"SLURM_GPUS_ON_NODE": "0"}])
def test_without_a_gpu_auto_is_the_cpu(start, env):
    assert start(0, **env).device == torch.device("cpu")


def test_a_network_interface_that_reaches_nobody_is_one_line_with_the_variables(start, monkeypatch):
    def full_mesh(*args, **kwargs):
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:144] no error")

    monkeypatch.setattr(ranks, "_meeting_point", lambda world: "file:///nowhere")
    real = start(0)
    assert real.world_size == 1
    monkeypatch.setattr(dist, "new_group", full_mesh)
    with pytest.raises(
        RunError, match=r"rank 1 of 2 .* cannot reach .* connectFullMesh .*; name .* GLOO_SOCKET_IFNAME"
    ):
        ranks._cpu_group(1, 2, timedelta(minutes=1))


def test_every_group_of_a_process_gets_the_limit_also_one_that_a_library_made(ranks_of_one):
    def timeout(group):
        return group._get_backend(torch.device("cpu")).options._timeout

    own = dist.new_group(backend="gloo", timeout=timedelta(minutes=10))  # as DeepSpeed's are
    assert timeout(own) == timedelta(minutes=10)
    ranks.set_timeouts(timedelta(minutes=50))
    groups = (own, ranks_of_one.cpu_group, dist.group.WORLD)
    assert [timeout(group) for group in groups] == [timedelta(minutes=50)] * 3


@pytest.fixture
def ranks_of_one(ranks):
    return ranks


@pytest.fixture
def leave(monkeypatch):
    """Call with a device: what `stop` asks of torch.distributed there, in order.

    seconds: that taking the groups down takes; peer_is_gone: whether another rank has ended.
    """
    calls = []

    def destroy(seconds):
        time.sleep(seconds)
        calls.append("destroy")

    def call(device, seconds=0.0, peer_is_gone=False):
        def barrier():
            calls.append("barrier")
            if peer_is_gone:
                raise RuntimeError("Connection closed by peer")

        monkeypatch.setattr(ranks, "LEAVE_S", 0.1)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: destroy(seconds))
        monkeypatch.setitem(sys.modules, "deepspeed.comm.comm", None)
        ranks.stop(SimpleNamespace(device=torch.device(device, 0), barrier=barrier))
        return list(calls)

    return call


@pytest.mark.parametrize("peer_is_gone", [False, True])
def test_ranks_on_gpus_wait_for_one_another_before_they_leave_their_groups(leave, peer_is_gone):
    assert leave("cuda", peer_is_gone=peer_is_gone) == ["barrier", "destroy"]


def test_a_group_that_cannot_be_taken_down_does_not_hold_the_end_of_a_run(leave):
    assert leave("cuda", seconds=0.5) == ["barrier"]


def test_ranks_on_cpus_leave_without_waiting(leave):
    assert leave("cpu") == ["destroy"]


def test_a_run_on_the_cpu_leaves_a_gpu_that_is_there_alone(monkeypatch):
    """Pinned memory would open a context on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {}

    def loader(*args, **settings):
        asked.update(settings)
        return []

    samples = SimpleNamespace(transform=SimpleNamespace(shape=(8, 8)))
    monkeypatch.setattr(data_loader, "DataLoader", loader)
    assert list(data_loader.load_batches(samples, iter([]), 0, 4)) == [] and asked["pin_memory"] is False


@pytest.mark.parametrize("name", ["nowhere/meet", "."])
def test_a_meeting_file_that_cannot_be_made_is_told_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MMTARD_INIT_FILE", str(tmp_path / name))
    with pytest.raises(UserError, match="MMTARD_INIT_FILE: ranks cannot meet at '.*'; name a file in a folder that"):
        ranks._meeting_point(1)


def test_a_rank_that_finds_no_temporary_folder_is_told_in_one_line(monkeypatch):
    def none(**_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.delenv("MMTARD_INIT_FILE", raising=False)
    monkeypatch.setattr(ranks.tempfile, "mkdtemp", none)
    with pytest.raises(UserError, match="^TMPDIR: No usable temporary .*; name a folder that can be written$"):
        ranks._meeting_point(1)


@pytest.mark.parametrize(
    "local, expected",
    [
        ([0], 1),
        ([0, 1, 2, 3], 4),  # one node
        ([0, 1, 0, 1], 2),
        ([0, 0, 0], 1),  # one a node
        ([0, 0, 1, 1], 4),  # dealt out in turn: the ranks of a node do not follow one another
        ([0, 1, 0], 3),  # nodes of different sizes
        ([0, 1, 2, 0, 1], 5),
    ],
)
def test_ranks_know_how_many_share_a_node(local, expected, monkeypatch):
    monkeypatch.setattr(ranks.Ranks, "all_gather", lambda self, item: local)
    assert ranks.Ranks(0, len(local), 0, torch.device("cpu"), None).ranks_a_node() == expected


def test_numbers_of_one_rank_are_a_row(ranks_of_one):
    numbers = torch.tensor([1.5, 2.0**52 + 1], dtype=torch.float64)
    assert ranks_of_one.gather_numbers(numbers).equal(numbers[None])


def test_a_forked_process_collects_no_garbage_of_its_parents():
    """A group of an earlier run, destroyed in a loader, waits for ever for threads that are not there."""
    destroyed = []

    class Group:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            destroyed.append(os.getpid())

    gc.collect()
    Group()
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(len(destroyed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gc.collect()
    assert destroyed == [os.getpid()]
