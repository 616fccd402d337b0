import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from mmtard import config
from mmtard.data.stream import train_stream
from mmtard.training import preflight
from mmtard.training.preflight import Bench, CheckFailed


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
    assert [bench.run(check) for check in preflight.CHECKS if check.name not in ("embeddings", "shards")] == [True] * 5
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "PASS versions",
        "PASS devices",
        "PASS network",
        "PASS models",
        "PASS folder",
    ]
    assert "1 x CPU" in lines[1] and "one rank, none to reach" in lines[2] and bench.most_images_per_s > 0
    assert list((tmp_path / "run").iterdir()) == []  # nothing left behind


def test_other_versions_on_a_rank_are_named(checks):
    with pytest.raises(CheckFailed, match="torch is 2 on rank 1 and 1 on rank 0; use one environment on all nodes"):
        preflight.Versions().verdict(checks(), [{"torch": "1", "cuda": None}, {"torch": "2", "cuda": None}])


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
    answers = iter([True, True, False, True, True, True])
    monkeypatch.setattr(preflight.Bench, "run", lambda self, check: next(answers))
    assert preflight.preflight(checks().config) == 1
