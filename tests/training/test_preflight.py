import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmtard import config
from mmtard.data.stream import train_stream
from mmtard.training import preflight
from mmtard.training.preflight_check import Bench, CheckFailed


@pytest.fixture
def checks(tree, write, ranks, vit):
    """Call with overrides: the checks of that run in a group of one; the student is a small ViT of random weights."""
    tree |= {"method": {"name": "tecoa"}, "teachers": {}, "student": {"arch": vit, "weights": "random"}}
    path = write(tree)
    return lambda *overrides: Bench(
        config.load(path, ["engine.device=cpu", "engine.precision=float32", *overrides]), ranks
    )


def test_what_one_process_can_check_passes(checks, tmp_path, capsys):
    bench = checks()
    assert [bench.run(check) for check in preflight.CHECKS if check.name not in ("embeddings", "shards")] == [True] * 6
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "PASS versions",
        "PASS devices",
        "PASS network",
        "PASS models",
        "PASS folder",
        "PASS limits",
    ]
    assert "1 x CPU" in lines[1] and "one rank, none to reach" in lines[2] and bench.most_images_per_s > 0
    assert list((tmp_path / "run").iterdir()) == []  # nothing left behind


def test_other_versions_on_a_rank_are_named(checks):
    with pytest.raises(CheckFailed, match="torch is 2 on rank 1 and 1 on rank 0; use one environment on all nodes"):
        preflight.Versions().verdict(checks(), [{"torch": "1", "cuda": None}, {"torch": "2", "cuda": None}])


@pytest.fixture
def on_a_gpu(checks, monkeypatch):
    """Call with a GPU's name, its memory and what of it is free (GiB): the devices line of one rank that has it."""
    from mmtard.training import machine_checks

    def line(name, total, free, driver="580.65.06", errors=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), int(total * 2**30)))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
        monkeypatch.setattr(machine_checks, "driver_version", lambda: driver)
        monkeypatch.setattr(machine_checks, "_memory_errors", lambda uuid: errors)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
        bench = checks()
        bench.ranks = replace(bench.ranks, device=torch.device("cuda", 0))
        devices = preflight.Devices()
        return devices.verdict(bench, [devices.measure(bench)])

    return line


def test_a_gpu_is_named_with_its_driver_and_the_cuda_that_needs_it(on_a_gpu):
    assert on_a_gpu("NVIDIA A100-SXM4-80GB", 79.3, 78.4) == (
        "1 x NVIDIA A100-SXM4-80GB, 78 GiB free; driver 580.65.06, torch for CUDA 13.0 (580 or newer)"
    )


def test_a_slice_of_a_gpu_is_said_to_be_one_and_its_own_context_does_not_fill_it(on_a_gpu):
    """Of 4.75 GiB, CUDA's context and NCCL take more than a tenth."""
    line = on_a_gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.75, 3.6)
    assert line.startswith("1 x NVIDIA A100-SXM4-40GB MIG 1g.5gb (a slice of a GPU, MIG: one for each rank, no mfu), 4")


def test_a_gpu_that_another_program_fills_is_told_with_what_to_do(on_a_gpu):
    with pytest.raises(CheckFailed, match=r"60.0 of 79.3 GiB of cuda:0 are free, another program .* end that one, or"):
        on_a_gpu("NVIDIA A100-SXM4-80GB", 79.3, 60.0)


def test_a_gpu_with_memory_errors_is_told(on_a_gpu):
    with pytest.raises(CheckFailed, match="cuda:0 had 3 uncorrected memory errors"):
        on_a_gpu("NVIDIA A100-SXM4-80GB", 79.3, 78.4, errors=3)


def test_a_driver_that_is_too_old_for_torch_is_told_where_no_gpu_is_seen(checks, monkeypatch, capsys):
    from mmtard.training import machine_checks

    monkeypatch.setattr(machine_checks, "driver_version", lambda: "535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not checks("engine.device=auto").run(preflight.Devices())
    assert (
        "torch sees no GPU: the driver 535.104.05 is older than 580, which CUDA 13.0 needs; update it, or install "
        "PyTorch's wheels for CUDA 12 (the selector on pytorch.org); engine.device=cpu leaves the GPU alone"
    ) in capsys.readouterr().out
    assert checks("engine.device=cpu").run(preflight.Devices()), "a run on the CPU needs no driver"


def test_the_loaders_of_all_ranks_of_a_node_share_its_memory(checks):
    bench, gib = checks("data.workers=4"), 2**30
    limits = preflight.Limits()
    found = [("node1", 4096, 8 * gib, 3 * gib), ("node1", 4096, 8 * gib, 3 * gib), ("node2", 1024, None, 9 * gib)]
    assert limits.verdict(bench, found) == (
        "loaders take up to 9 of 8 GiB of /dev/shm on a node; a rank may open 1024 files"
    )
    with pytest.raises(CheckFailed, match=r"/dev/shm of node1 has 8 GiB free, .* take up to 9 GiB; .*data.workers"):
        limits.verdict(bench, [*found, ("node1", 4096, 8 * gib, 3 * gib)])
    node, files, free, taken = limits.measure(bench)
    assert taken == (2 * 4 + 1) * 8 * 3 * 224 * 224 and free > 0 and files >= 1024


def test_a_wrong_sum_names_its_ranks(checks):
    with pytest.raises(CheckFailed, match=r"a sum over 3 ranks came out wrong on ranks \[1\]"):
        preflight.Network().verdict(checks(), [(True, 0.1), (False, 0.1), (True, 0.1)])
    assert "at 0.833 GiB/s of bus bandwidth" in preflight.Network().verdict(
        checks(), [(True, 0.05), (True, 0.1), (True, 0.1)]
    )  # 2/3 * 2 * 64 MiB in 0.1 s


def test_a_folder_that_cannot_be_written_or_is_too_small(checks, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert not checks(f"run_dir={tmp_path / 'file' / 'run'}").run(preflight.Folder())
    assert "FAIL folder: rank 0 (" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100e6))
    bench = checks("checkpoint.keep_every=5")
    bench.parameters = 2_000_000  # 24 MB a checkpoint; two kept, one being written, two for good
    assert not bench.run(preflight.Folder())
    assert "FAIL folder: 5 checkpoints take 0.12 GB and" in capsys.readouterr().out


def test_what_the_run_would_name_its_classes_by(checks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        preflight, "open_dataset_on_all_ranks", lambda settings, ranks: SimpleNamespace(labels=np.array([0, 3]))
    )
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for overrides, told in (
        ([f"data.classnames={tmp_path}/gone.txt"], "cannot read"),
        ([f"data.classnames={tmp_path}/names.txt"], "has 2 names, and the shards have a sample of label 3"),
        ([f"data.classnames={tmp_path}/names.txt", "probe={data: /nowhere, every: 500}"], "missing shard '/nowhere'"),
    ):
        assert not checks(*overrides).run(preflight.Shards())
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, labels, captions",
    [
        ((), True, False),
        (("data.targets=none", "method.name=fare"), False, False),
        (("data.targets=captions", "method.name=fare"), False, True),
    ],
)
def test_the_shards_need_what_the_training_needs_of_them(checks, monkeypatch, overrides, labels, captions):
    monkeypatch.setattr(preflight, "open_dataset_on_all_ranks", lambda settings, ranks: Shards())
    monkeypatch.setattr(preflight, "classnames", lambda *_: ["a"])
    asked = []
    monkeypatch.setattr(
        preflight, "train_stream", lambda *a, **more: asked.append(train_stream(*a, **more).samples) or [[0], [0]]
    )
    preflight.Shards().measure(checks(*overrides))
    assert [(samples.need_labels, samples.need_captions) for samples in asked] == [(labels, captions)]


class Shards:
    remote, paths, labels, shard_counts = False, ["0.tar"], np.zeros(8, dtype=int), np.array([8])

    def __len__(self):
        return 8


def test_weights_that_are_absent_fail_and_the_rest_goes_on(checks, capsys):
    assert not checks("student.weights=gone.pt").run(preflight.Models())
    assert capsys.readouterr().out.startswith("FAIL models: rank 0 (")


def test_shards_slower_than_the_models(checks):
    bench = checks()
    bench.most_images_per_s = 100.0
    assert "read at 120 images/s" in preflight.Shards().verdict(bench, [(9, 1, 60.0), (9, 1, 70.0)])
    with pytest.raises(CheckFailed, match="read at 80 images/s; the models may take 100: raise data.workers"):
        preflight.Shards().verdict(bench, [(9, 1, 40.0), (9, 1, 70.0)])


def test_the_status_is_1_when_any_check_fails(checks, monkeypatch):
    answers = iter([True, True, False, True, True, True, True])
    monkeypatch.setattr(preflight.Bench, "run", lambda self, check: next(answers))
    assert preflight.preflight(checks().config) == 1
