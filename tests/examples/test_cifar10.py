"""The CIFAR-10 comparison: its shards, that its budgets are equal, and its table."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from mmtard import config as settings
from mmtard.data.dataset import open_dataset
from mmtard.data.images import decode
from mmtard.data.reader import Reader
from mmtard.errors import UserError
from mmtard.examples import cifar10 as comparison, stages
from mmtard.examples.cifar10_shards import make_shards

CONFIGS = Path(__file__).parents[2] / "configs" / "cifar10"
CLASSES = ["cat", "dog", "frog"]


def encoded(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8)).save(out, "WEBP", lossless=True)
    return out.getvalue()


@pytest.fixture
def archives(tmp_path):
    """A folder of three archives: seven training images in two of them, four test images in the third."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, first, n in (("cifar10_train0of2", 0, 4), ("cifar10_train1of2", 4, 3), ("cifar10_test", 7, 4)):
        images = [encoded(i) for i in range(first, first + n)]
        offset = np.cumsum([0, *map(len, images)])
        label = np.arange(first, first + n) % len(CLASSES)
        np.savez(
            folder / f"{name}.npz",
            blob=np.frombuffer(b"".join(images), np.uint8),
            offset=offset,
            label=label,
            classes=np.array(CLASSES),
        )
    return folder


def test_archives_become_shards_of_the_same_images_and_labels(archives, tmp_path):
    out = make_shards(archives, tmp_path / "out")
    for split, numbers in (("train", range(7)), ("test", range(7, 11))):
        dataset = open_dataset(settings.Data(shards=str(out / split)))
        reader = Reader(dataset)
        pixels = [int(np.asarray(decode(reader.image(i)))[0, 0, 0]) for i in range(len(dataset))]
        assert pixels == list(numbers)
        assert dataset.labels.tolist() == [i % 3 for i in numbers]
        assert (out / split / "classnames.txt").read_text().split() == CLASSES


def test_a_second_call_writes_nothing_and_another_source_everything(archives, tmp_path):
    out = make_shards(archives, tmp_path / "out")
    before = (out / "train" / "0.tar").stat().st_mtime_ns
    make_shards(archives, out)
    assert (out / "train" / "0.tar").stat().st_mtime_ns == before
    folders = tmp_path / "folders"
    for split in ("train", "test"):
        for name in CLASSES:
            (folders / split / name).mkdir(parents=True)
            (folders / split / name / "0.png").write_bytes(encoded(9))
    make_shards(folders, out)
    assert len(open_dataset(settings.Data(shards=str(out / "train")))) == 3


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither train/ and test/ folders"):
        make_shards(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_student_has_the_same_budget_start_and_attack():
    students = [settings.load(CONFIGS / f"{name}.yaml") for name in comparison.STUDENTS]
    assert [c.method.name for c in students] == list(comparison.STUDENTS)
    for c in students:
        assert (c.train, c.student, c.data) == (students[0].train, students[0].student, students[0].data)
        assert (c.attack.eps, c.attack.steps, c.attack.step_size) == (
            students[0].attack.eps,
            students[0].attack.steps,
            students[0].attack.step_size,
        )
        assert c.attack.eps == comparison.EPS
        assert c.run_dir == str(comparison.ROOT / c.method.name)
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {"base", *comparison.STUDENTS, *comparison.TEACHERS}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The words of each training that a comparison asks for; shards, pretraining and trainings do nothing here."""
    monkeypatch.chdir(tmp_path)  # an empty folder: the configurations come with the package
    monkeypatch.setattr(comparison, "make_shards", lambda source, out: out)
    monkeypatch.setattr(comparison, "pretrain", lambda *args, **kwargs: {})
    given = []
    monkeypatch.setattr(comparison, "train", lambda config, *words: given.append((config.stem, *words)))
    return given


def test_the_table_has_a_row_for_each_model_with_its_own_numbers(trained, monkeypatch, capsys):
    models = ["start", *comparison.TEACHERS, *comparison.STUDENTS]

    def accuracy(percent):
        return {"accuracy": percent / 100, "interval95": [(percent - 3) / 100, (percent + 3) / 100], "n": 1000}

    under = [{"attacks": {"pgd": accuracy(30 + i), "apgd-ce": accuracy(20 + i)}} for i in range(9)]
    measured = {name: {"clean_all": accuracy(50 + i), "eps": {"4/255": under[i]}} for i, name in enumerate(models)}
    monkeypatch.setattr(comparison, "_measure", lambda: measured)
    assert comparison.compare(["cifar10", "train.steps=100"]) == 0
    assert trained == [(name, "train.steps=100") for name in models[1:]]
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[0] for row in cells] == models
    assert cells[0][1:] == ["50.0 (47-53)", "30.0 (27-33)", "20.0 (17-23)"]
    assert cells[8][1:] == ["58.0 (55-61)", "38.0 (35-41)", "28.0 (25-31)"]


def test_a_training_that_fails_ends_the_comparison_with_its_status(trained, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "train", stages.train)
    monkeypatch.setattr(stages, "load", lambda *_: SimpleNamespace(engine=SimpleNamespace(device="cpu")))
    monkeypatch.setattr(stages.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=75))
    assert comparison.compare(["cifar10"]) == 75
    assert "clean_teacher.yaml ended with status 75" in capsys.readouterr().err


def test_a_setting_that_fits_no_training_is_told_before_anything_is_done(trained, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "make_shards", None)
    assert comparison.compare(["cifar10", "train.steps=20"]) == 2
    assert "train.warmup_steps: 56 is more than train.steps 20; lower it" in capsys.readouterr().err and not trained


def test_the_architectures_differ_in_size_alone():
    student, teacher = (
        json.loads((Path(comparison.__file__).with_name(f"cifar10-{name}.json")).read_text())
        for name in ("student", "teacher")
    )
    assert student["text_cfg"] == teacher["text_cfg"] and student["embed_dim"] == teacher["embed_dim"]
    assert student["vision_cfg"]["layers"] < teacher["vision_cfg"]["layers"]
    assert yaml.safe_load((CONFIGS / "base.yaml").read_text())["student"]["arch"].endswith("cifar10-student.json")
