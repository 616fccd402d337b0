"""What a dataset's user should hear: likely mistakes in names and captions, and samples that are in no number."""

import io
import json
import os
import tarfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_datasets import COLOURS, write

from mmtard.config import Model
from mmtard.data.shard_writer import INDEX, NUMBER, RECORD
from mmtard.errors import UserError
from mmtard.evaluation import class_folders, data_checks, datasets, table


@pytest.mark.parametrize("names, told", [
    (["crane", "Crane", "bird"], "1 are read as another one ('crane' and 'Crane')"),
    (["crane", "crane", "bird"], "'crane' twice: the model cannot tell these classes apart"),
    (["n01440764", "n01443537", "n01484850"], "3 of 3 are WordNet ids ('n01440764', 'n01443537', 'n01484850'): write"),
    (["0", "1", "2"], "3 of 3 are numbers"),
    (["0,cat", "1,dog", "bird"], "2 of 3 are numbered lines"),
    (["apple_pie", "dog", "cat"], "1 of 3 are words joined by _ ('apple_pie')"),
    (["['cat', 'dog']", "a", "b"], "1 of 3 are text of a list"),
    (["cat", "dog", "bird", "fish", "fox"], "5 names, but the highest label is 2"),
])  # fmt: skip
def test_class_names_that_are_likely_mistakes_are_told(names, told):
    (line,) = data_checks.class_name_lines(names, np.array([0, 1, 2, -1]), [])
    assert line["status"] == "WARN" and told in line["detail"]


def test_class_names_of_words_say_nothing():
    names = ["tench, Tinca tinca", "jack-o'-lantern", "T-shirt", "2CV", "great white shark"]
    assert data_checks.class_name_lines(names, np.arange(5), []) == []


def test_names_that_the_text_tower_cannot_tell_apart_are_told(measure, tmp_path):
    long = "very " * 80
    folder = write(
        tmp_path / "long", 8, size=(8, 8), classes={long + "red": 0, long + "green": 1, "blue": 2, "grey": None}
    )
    (entry,) = measure(folder, attacks=("pgd",), iters=1)["datasets"]
    (line,) = [line for line in entry["health"] if line["check"] == "class names"]
    assert line["status"] == "WARN" and line["detail"].startswith("1 are read as another one ('very very")


def test_captions_that_the_text_tower_cannot_tell_apart_are_told(measure, tmp_path):
    long = "very " * 80
    folder = write(
        tmp_path / "flickr", 6, size=(8, 8), captions=lambda i: f"{long} long {i}" if i < 3 else f"short {i}"
    )
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (entry,) = measure(folder, attacks=("apgd-ce",), iters=1)["datasets"]
    (line,) = [line for line in entry["health"] if line["check"] == "captions"]
    assert line["status"] == "WARN" and line["detail"].startswith("2 of 6 are read as another one ('very very")


def test_a_json_list_of_captions_is_several_captions(measure, tmp_path):
    texts = [["a red square", "a square"], ["green"], ["blue", "  ", "one more"]]
    folder = write(tmp_path / "flickr", 3, size=(8, 8), captions=lambda i: json.dumps(texts[i]))
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (entry,) = measure(folder, attacks=("apgd-ce",), iters=1)["datasets"]
    assert entry["captions"] == 5


def test_accuracy_that_is_not_above_chance_is_told():
    def clean(right, n):
        from mmtard.evaluation.results import accuracy

        return accuracy([True] * right + [False] * (n - right))

    (line,) = data_checks.chance_lines(clean(26, 100), 0.25)
    assert (line["status"], line["check"]) == ("WARN", "above chance")
    assert line["detail"].startswith("not shown: clean accuracy is 26.00 % (") and "chance 25.00 %" in line["detail"]
    for cause in ("too few samples", "not have learned", "class names may not be in the order of the labels"):
        assert cause in line["detail"]
    assert data_checks.chance_lines(clean(60, 100), 0.25) == []


def test_samples_that_are_in_no_number_are_counted_by_kind(measure, tmp_path, capsys):
    folder = tmp_path / "half" / "test"
    folder.mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(image, "PNG")
    labels = [b"0", b"1", b"2", b"3", None, None, b"n02123045", b"0"]
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, label in enumerate(labels):
            members = {"png": image.getvalue()} if i < 7 else {}
            for extension, content in (members | ({"cls": label} if label else {})).items():
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "half" / "classnames.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    found = measure(tmp_path / "half", attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    assert (
        entry["n_total"] == 4
        and sorted(entry["not_used"].values()) == [1, 1, 2]
        and entry["not_used"]["no .cls member"] == 2
    )
    (line,) = [line for line in entry["health"] if line["check"] == "every sample has a label"]
    assert (
        line["status"] == "WARN" and "3 of 7 samples have none and are in no number (0.tar/4: no .cls" in line["detail"]
    )
    table.show(found)
    assert "half: 4 samples used, 4 not: 2 no .cls member; 1 " in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of two images of equal size, names and times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, colour in (("cat", 60), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            path = tmp_path / "photos" / name / f"{i}.png"
            Image.fromarray(np.full((8, 8, 3), colour + i, np.uint8)).save(path)
            os.utime(path, (1e9, 1e9))
    return tmp_path / "photos"


def test_two_classes_whose_images_are_exchanged_are_other_data(photos, measure):
    before = measure(photos, attacks=("pgd",), iters=1)["datasets"][0]
    photos.joinpath("cat").rename(photos / "x")
    photos.joinpath("dog").rename(photos / "cat")
    photos.joinpath("x").rename(photos / "dog")
    after = measure(photos, attacks=("pgd",), iters=1)["datasets"][0]
    assert after["fingerprint"] != before["fingerprint"]
    assert after["samples"]["clean_prediction"] == [
        before["samples"]["clean_prediction"][k] for k in after_order(before, after)
    ]


def after_order(before, after):
    """The places in `before` of the images of `after`, by their names: cat's are dog's."""
    swap = {"cat": "dog", "dog": "cat"}
    places = {key.partition("-")[2]: k for k, key in enumerate(before["samples"]["keys"])}
    names = [key.partition("-")[2].split("-") for key in after["samples"]["keys"]]
    return [places[f"{swap[folder]}-{stem}"] for folder, stem in names]


def test_a_class_folder_that_got_one_more_image_is_read_anew(photos, measure):
    said = []
    assert measure(photos, attacks=("pgd",), iters=1)["datasets"][0]["n_total"] == 4
    (photos / "cat" / "9.png").write_bytes((photos / "cat" / "0.png").read_bytes())
    assert measure(photos, attacks=("pgd",), iters=1, say=said.append)["datasets"][0]["n_total"] == 5
    assert "anew, for they changed" in said[0]


def test_shards_of_earlier_contents_go_once_nobody_used_them_for_a_day(photos, tmp_path):
    (source,) = datasets.find_datasets(str(photos))
    said = []
    first = class_folders.with_shards(source, said.append).data.shards
    assert class_folders.with_shards(source, said.append).data.shards == first and len(said) == 1
    (photos / "dog" / "9.png").write_bytes((photos / "cat" / "0.png").read_bytes())
    other = tmp_path / "cache" / "mmtard" / f"{os.path.basename(first)[:-16]}{'0' * 16}"
    other.mkdir()  # not made by mmtard
    os.utime(other, (0, 0))
    second = class_folders.with_shards(source, said.append).data.shards
    assert os.path.exists(os.path.join(first, RECORD)), "another evaluation may read them"
    os.utime(first, (0, 0))
    assert class_folders.with_shards(source, said.append).data.shards == second
    assert not os.path.exists(first) and other.exists()


def test_shards_that_an_evaluation_reads_for_days_stay_until_it_ends(photos):
    (source,) = datasets.find_datasets(str(photos))
    with ExitStack() as held:
        first = Path(class_folders.with_shards(source, print, held).data.shards)
        (photos / "dog" / "9.png").write_bytes((photos / "cat" / "0.png").read_bytes())
        os.utime(first, (0, 0))
        second = Path(class_folders.with_shards(source, print).data.shards)
        assert first != second and (first / RECORD).is_file() and (first / "000000.tar").is_file()
    class_folders.with_shards(source, print)
    assert not first.exists() and second.exists()


def test_an_evaluation_holds_the_shards_that_it_reads(photos, measure, monkeypatch):
    from mmtard.attacks import ensemble
    from mmtard.files import exclusive

    run, refused = ensemble.run_attacks, []

    def while_held(*args):
        (record,) = Path(os.environ["XDG_CACHE_HOME"]).rglob(RECORD)
        with pytest.raises(BlockingIOError), exclusive(record, patience=0):
            pass
        refused.append(record)
        return run(*args)

    monkeypatch.setattr(ensemble, "run_attacks", while_held)
    measure(photos, attacks=("pgd",), iters=1)
    assert refused
    with exclusive(refused[0], patience=0):
        pass  # given free with the evaluation's end


def test_shards_of_an_unchanged_folder_are_written_once_and_completed_where_some_are_missing(photos):
    (source,) = datasets.find_datasets(str(photos))
    shards = Path(class_folders.with_shards(source, print).data.shards)
    before = (shards / INDEX).stat()
    class_folders.with_shards(source, print)
    after = (shards / INDEX).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for lost in (INDEX, NUMBER, "000000.tar"):
        (shards / lost).unlink()
        class_folders.with_shards(source, print)
        assert (shards / lost).is_file()


def test_cached_shards_that_never_become_whole_are_refused_with_the_remedy(photos, monkeypatch):
    (source,) = datasets.find_datasets(str(photos))
    shards = Path(class_folders.with_shards(source, print).data.shards)
    (shards / "stray.tar").touch()
    write_shards, calls = class_folders.write_shards, []

    def counted(*args, **settings):
        calls.append(args)
        assert len(calls) <= 2, "the same again and again"
        return write_shards(*args, **settings)

    monkeypatch.setattr(class_folders, "write_shards", counted)
    with pytest.raises(UserError, match=f"^{source.name}: .*'{shards}'.*; remove that folder"):
        class_folders.with_shards(source, print)
    (shards / "stray.tar").unlink()
    assert class_folders.with_shards(source, print).data.shards == str(shards)


def test_every_rank_takes_the_same_checkpoint_of_a_run(exported, ranks, tmp_path, monkeypatch):
    from dataclasses import replace

    from mmtard.evaluation import model

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(model, "resolve", lambda folder: (folder, folder / "checkpoints" / "step-7"))
    two = replace(ranks, world_size=2)
    monkeypatch.setattr(type(two), "run_on_first", lambda self, make: make())
    pinned = model._the_same_everywhere(Model(weights=str(tmp_path)), two)
    assert pinned.weights == str(tmp_path / "checkpoints" / "step-7")
    assert model._the_same_everywhere(Model(weights=str(exported)), two).weights == str(exported)


def _labelled(folder, members):
    """A folder with one shard of images, each with the members that `members(i)` gives."""
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(image, "PNG")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(6):
            for extension, content in ({"png": image.getvalue()} | members(i)).items():
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "classnames.txt").write_text("cat\ndog\nbird\n")
    return folder


@pytest.mark.parametrize("members, told", [
    (lambda i: {"cls": b"dog"}, "6 with a label that is not an integer (such as 'dog' in '0.cls')"),
    (lambda i: {"cls": b"-1"}, "6 with a label that is not an integer (such as '-1' in '0.cls')"),
    (lambda i: {"json": b'{"label": 1}'}, "6 without a label; evaluation needs the number of the class"),
    (lambda i: {"cls.txt": b"1"}, "not read: 6 labels with more than one dot in their name"),
])  # fmt: skip
def test_data_without_a_usable_label_are_refused_with_the_reason_that_is_theirs(measure, tmp_path, members, told):
    with pytest.raises(UserError) as refused:
        measure(_labelled(tmp_path / "s", members), attacks=("pgd",), iters=1)
    assert "'s' has no sample with a usable label: " in str(refused.value) and told in str(refused.value)
    assert "--label-key" in str(refused.value) and "\n" not in str(refused.value)


def test_labels_that_count_from_1_are_told():
    (line,) = data_checks.class_name_lines(["cat", "dog", "bird"], np.array([1, 2, -1, 2]), [])
    assert line["detail"].startswith("no sample has label 0 ('cat'), the lowest is 1: labels count from 0")


def test_a_clean_accuracy_of_zero_is_not_above_chance():
    clean = {"accuracy": 0.0, "interval95": [0.0, 0.39]}
    (line,) = data_checks.chance_lines(clean, 0.33)
    assert "clean accuracy is 0.00 % (0.0 to 39.0), chance 33.00 %" in line["detail"]


def test_a_single_class_leaves_no_attack_and_asks_for_the_others(measure, tmp_path):
    folder = _labelled(tmp_path / "one", lambda i: {"cls": b"0"})
    (folder / "classnames.txt").write_text("cat\n")
    with pytest.raises(UserError, match="one: no attack is left .*; name all of the model's classes, one a line"):
        measure(folder, attacks=("pgd", "apgd-ce"), iters=1)


@pytest.mark.parametrize("shift, change, remedy", [
    (1, "less by one, 10.00 % as they stand", "labels count from 0: write them anew"),
    (-1, "more by one, 10.00 % as they stand", "is the first of the names a heading? remove it"),
])  # fmt: skip
def test_predictions_that_fit_only_other_labels_are_a_failure(shift, change, remedy):
    right = [2, 3, 4, 5] * 9
    labels = [label + shift for label in right] + [2, 3, 4, 5]
    (line,) = data_checks.shifted_lines(labels, right + [2, 3, 4, 5], chance=1 / 8)
    assert (
        line["status"] == "FAIL"
        and f"90.00 % of the clean predictions are right with every label {change}" in (line["detail"])
    )
    assert line["detail"].endswith(remedy) or remedy in line["detail"]


def test_chance_a_single_class_and_right_labels_are_no_shift():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 4, (2, 300)).tolist()
    assert data_checks.shifted_lines(labels, guesses, 1 / 4) == []
    assert data_checks.shifted_lines([2] * 280 + [1] * 20, [1] * 300, 1 / 4) == [], "a model of one answer"
    assert data_checks.shifted_lines(labels, labels, 1 / 4) == data_checks.shifted_lines([], [], 1 / 4) == []
