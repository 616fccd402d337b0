"""Datasets by name: where they are found, and what is particular to each."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image
from tiny_datasets import COLOURS, write

from mmtard.attacks import ensemble
from mmtard.config import Data, Model
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Native, decode
from mmtard.data.reader import Reader
from mmtard.data.samples import SampleReader
from mmtard.data.stream import eval_batches
from mmtard.errors import UserError
from mmtard.evaluation import datasets, prompts, table
from mmtard.evaluation.protocols import FARE_SETS, PROTOCOLS
from mmtard.evaluation.request import default_out, protocol

FOLDERS = [
    "wds/vtab/cifar10",
    "wds/vtab-cifar100",
    "wds/stl10",
    "wds_imagenet-r",
    "wds/fgvc_aircraft",
    "imagenet1k",
    "wds/imagenetv2",
    "my-own_set",
]


@pytest.fixture
def root(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder / "test").mkdir(parents=True)
        (tmp_path / folder / "test" / "0.tar").touch()
    return tmp_path


def test_names_as_clip_benchmark_lays_them_out(root):
    found = {s.name: s for s in datasets.find_datasets(str(root))}
    assert found.keys() == {
        "CIFAR10",
        "CIFAR100",
        "STL-10",
        "ImageNet-R",
        "FGVC",
        "ImageNet",
        "ImageNet-V2",
        "my-own_set",
    }
    assert found["CIFAR10"].data.shards == str(root / "wds" / "vtab" / "cifar10" / "test")
    assert [
        s.name for s in datasets.find_datasets(str(root), ["cifar-10", "wds/fgvc_aircraft", "ImageNet-R", "my-own_set"])
    ] == ["CIFAR10", "FGVC", "ImageNet-R", "my-own_set"]
    assert [s.name for s in datasets.find_datasets(str(root / "imagenet1k" / "test"))] == ["ImageNet"]
    with pytest.raises(UserError, match=f"unknown dataset in '{re.escape(str(root))}' 'pets'; known: CIFAR10"):
        datasets.find_datasets(str(root), ["pets"])


def test_a_split_is_no_name(tmp_path):
    """Two sets given as A/test and B/test are not one."""
    for name, split in (("birds", "test"), ("fish", "val"), ("fish", "other")):
        write(tmp_path / name / split, 1)
        (tmp_path / name / split / "test" / "0.tar").rename(tmp_path / name / split / "0.tar")
    given = ["birds/test", "birds/test/{0..0}.tar", "fish/val", "fish/other"]
    assert [s.name for g in given for s in datasets.find_datasets(str(tmp_path / g))] == [
        "birds",
        "birds",
        "fish",
        "other",
    ]


def test_shards_that_no_folder_names_are_called_after_their_split(tmp_path):
    for split in ("test", "val"):
        write(tmp_path / "shards" / split, 1)
        (tmp_path / "shards" / split / "test" / "0.tar").rename(tmp_path / "shards" / split / "0.tar")
    given = ["shards/test", "shards/val/{0..0}.tar", "shards"]
    assert [s.name for g in given for s in datasets.find_datasets(str(tmp_path / g))] == [
        "shards/test",
        "shards/val",
        "shards/test",
    ]


@pytest.mark.parametrize("where, index, name", [
    ("https://host.org/shards/test/{000..012}.tar", None, "shards/test"),
    ("https://host.org/data/birds/test/{000..012}.tar", None, "birds"),
    ("s3://bucket/fish/val/0.tar", "x.npz", "fish"),
    ("pipe:aws s3 cp s3://bucket/sets/birds/{0..9}.tar -", None, "birds"),
    ("pipe:cat '/data/fish/test/{0..9}.tar'", None, "fish"),
    ("file:/data/birds/0.tar", None, "birds"),
    ("https://host.org/birds-{000..012}.tar", "x.npz", "birds"),
    ("https://host.org/birds-07.tar", None, "birds"),
    ("https://host.org/{000..012}.tar", "indices/fish.npz", "fish"),
    ("pipe:fetch everything", None, "remote"),
    ("https://huggingface.co/datasets/clip-benchmark/wds_cifar10/resolve/main/test/{0..1}.tar", None, "CIFAR10"),
    (
        "https://huggingface.co/datasets/timm/imagenet-1k-wds/resolve/main/imagenet1k-validation-{00..63}.tar",
        None,
        "ImageNet",
    ),
])  # fmt: skip
def test_remote_shards_are_named_after_their_folder_files_or_index(where, index, name):
    (source,) = datasets.find_datasets(where, index=index)
    assert (
        source.name == name
        and source.kind.name == (name if name in ("CIFAR10", "ImageNet") else "")
        and source.data.index == index
    )


def test_the_datasets_of_fare_and_imagenets_variants_and_no_others_have_an_entry():
    names = {k.name for k in datasets.KNOWN}
    assert (
        len(FARE_SETS) == 13
        and set(FARE_SETS) | {f"ImageNet{end}" for end in ("", "-V2", "-A", "-R", "-Sketch", "-C")} == names
    )
    assert {k.name for k in datasets.KNOWN if k.native} == {"CIFAR10", "CIFAR100", "STL-10"}
    assert all(datasets.known(name) is k for k in datasets.KNOWN for name in (k.name, *k.spellings))


def test_the_page_names_the_datasets_that_have_an_entry():
    page = " ".join((Path(__file__).parents[2] / "docs" / "robustness.md").read_text(encoding="utf-8").split())
    listed = re.search(r"Known by name, with what is particular to them: (.*?)\. ", page)[1].split(", ")
    assert sorted(listed) == sorted(k.name for k in datasets.KNOWN)


def test_a_spelling_may_be_written_as_its_folder_is(monkeypatch):
    food = datasets.DatasetInfo("Food", ("food-101",))
    monkeypatch.setattr(datasets, "KNOWN", (*datasets.KNOWN, food))
    assert datasets.known("wds_food101") is datasets.known("Food-101") is food


@pytest.mark.parametrize("make, message", [
    (lambda root: str(root / "gone"), "missing shard"),
    (lambda root: str(root / "empty"), "is no dataset and holds none"),
    (lambda root: str(root / "twice"), "holds the dataset CIFAR10 twice"),
])  # fmt: skip
def test_a_root_that_holds_no_dataset(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    for name in ("cifar10", "vtab/cifar10"):
        write(tmp_path / "twice" / name, 1)
    with pytest.raises(UserError, match=message):
        datasets.find_datasets(make(tmp_path))


def test_eurosats_names_are_put_into_words(measure, tmp_path):
    """Its folders' names, `AnnualCrop`, are no words that CLIP has read."""
    write(tmp_path / "wds" / "vtab-eurosat", 20, classes=dict.fromkeys(datasets.EUROSAT))
    (entry,) = measure(tmp_path, attacks=("pgd",), iters=1)["datasets"]
    assert entry["name"] == "EuroSAT" and entry["classes"] == list(datasets.EUROSAT.values())
    assert entry["classes"][0] == "annual crop land" and entry["classes"][9] == "lake or sea" and entry["chance"] == 0.1


def test_two_classes_have_no_targeted_attack_and_a_chance_of_half(measure, tmp_path, capsys):
    """PCAM near 50 % is chance, which only who sees the chance level knows."""
    write(tmp_path / "pcam", 12, classes={"lymph node": 0, "lymph node containing metastatic tumor tissue": 2})
    found = measure(tmp_path, attacks=("apgd-ce", "apgd-t"))
    (entry,) = found["datasets"]
    table.show(found)
    printed = capsys.readouterr().out
    assert re.search(r"│ +50\.00 │\n", printed)
    assert (
        "WARN PCAM: every attack ran: eps 0.01569: apgd-t left out: "
        "the targeted DLR loss needs 4 classes, there are 2\n" in printed
    )
    assert entry["chance"] == 0.5 and list(entry["eps"]["4/255"]["attacks"]) == ["apgd-ce"]
    assert entry["eps"]["4/255"]["skipped"] == {"apgd-t": "the targeted DLR loss needs 4 classes, there are 2"}
    with pytest.raises(UserError, match="PCAM: no attack is left .*; add --attacks apgd-ce"):
        measure(tmp_path, tmp_path / "other", attacks=("apgd-t",))


@pytest.mark.parametrize("names, said", [
    (FARE_SETS, ""),
    ((*FARE_SETS, "ImageNet"), ""),
    (FARE_SETS[1:], "not the mean that fare publishes: without Caltech101\n"),
    ((*FARE_SETS, "MNIST", "SVHN", "ImageNet"), "not the mean that fare publishes: with MNIST, SVHN\n"),
    ((*FARE_SETS[1:], "MNIST"), "not the mean that fare publishes: without Caltech101; with MNIST\n"),
])  # fmt: skip
def test_a_mean_over_other_sets_than_published_is_told(colours, measure, capsys, names, said):
    found = measure(colours, attacks=("pgd",), iters=1)
    table.show(found | {"protocol": "fare", "datasets": [found["datasets"][0] | {"name": name} for name in names]})
    assert "".join(re.findall("not the mean.*\n", capsys.readouterr().out)) == said


def test_cifar_is_perturbed_at_its_own_size_and_resized_inside_the_model(measure, tmp_path, monkeypatch):
    """A perturbation of the resized image has more pixels, and breaks more, than one of the stored image."""
    write(tmp_path / "root" / "cifar10", 8, size=(16, 12))
    write(tmp_path / "root" / "dtd", 8, size=(16, 12))
    sizes, run = {}, ensemble.run_attacks
    monkeypatch.setattr(
        ensemble,
        "run_attacks",
        lambda model, images, *args: sizes.setdefault(tuple(images.shape[2:])) or run(model, images, *args),
    )
    found = {d["name"]: d for d in measure(tmp_path / "root", iters=1)["datasets"]}
    assert found["CIFAR10"]["perturb_at"] == "native" and found["CIFAR10"]["perturbed_size"] == [16, 12]
    assert found["DTD"]["perturb_at"] == "input" and found["DTD"]["perturbed_size"] == [32, 32]
    assert set(sizes) == {(16, 12), (32, 32)}
    found = {
        d["name"]: d for d in measure(tmp_path / "root", tmp_path / "input", iters=1, perturb_at="input")["datasets"]
    }
    assert found["CIFAR10"]["perturbed_size"] == [32, 32]


def test_images_of_several_sizes_have_no_native_size(measure, tmp_path):
    for name, size in (("cat", (20, 20)), ("dog", (24, 20))):
        folder = tmp_path / "photos" / "val" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(folder / "0.png")
    with pytest.raises(
        UserError,
        match="'.*' is 2.x2. pixels, others are 2.x2.: images of several sizes have no common native size; "
        "use --perturb-at input",
    ):
        measure(tmp_path / "photos", perturb_at="native")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_class_folders_are_read_as_they_are(measure, tmp_path):
    said = []
    for name in ("blue", "red"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((40, 50, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (entry,) = measure(tmp_path / "photos", attacks=("pgd",), iters=1, say=said.append)["datasets"]
    assert (
        entry["name"] == "photos" and entry["classes"] == ["blue", "red"] and entry["data"] == str(tmp_path / "photos")
    )
    assert (
        sorted(entry["samples"]["labels"]) == [0, 0, 0, 1, 1, 1]
        and "is read from shards, which are written to" in said[0]
    )


def test_prompts_are_the_datasets_own_then_imagenets_then_the_simple_one(tmp_path):
    def of(name, file=None, protocol="quick"):
        folder = write(tmp_path / name, 1)
        if file:
            (folder / "zeroshot_classification_templates.txt").write_text(file)
        (source,) = datasets.find_datasets(str(folder))
        return prompts.prompts_of(source, PROTOCOLS[protocol])[0]

    assert of("pets", "a photo of a {c}, a type of pet.\n") == ["a photo of a {}, a type of pet."]
    assert (
        of("imagenet-a") == [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
        and len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80
    )
    assert of("imagenet-r", "the {c}\n") == ["the {}"]
    assert of("own") == ["This is a photo of a {}"] == of("cars", "a {c}\n", protocol="tecoa")


def test_imagenets_subsets_have_their_own_class_names(tmp_path):
    def names(folder):
        (source,) = datasets.find_datasets(str(folder))
        return prompts.names_of(source, open_dataset(source.data))

    assert names(write(tmp_path / "imagenet-a", 2, classes=COLOURS)) == list(COLOURS)
    folder = write(tmp_path / "imagenetv2", 1000, size=(1, 1), classes=[str(i) for i in range(1000)])
    (folder / "classnames.txt").unlink()
    assert names(folder) == list(open_clip.IMAGENET_CLASSNAMES)
    few = write(tmp_path / "imagenet1k", 2)
    (few / "classnames.txt").rename(few / "test" / "classnames.txt")
    assert names(few) == list(COLOURS)
    (few / "test" / "classnames.txt").unlink()
    with pytest.raises(
        UserError,
        match="imagenet1k.*' has 2 classes, ImageNet has 1000: .* in a classnames.txt beside them or with --classnames",
    ):
        names(few)


def test_imagenet_v2s_folders_are_numbers(measure, tmp_path):
    """Sorted as text, 10 and 100 come before 2, and 988 of open_clip's 1000 names go to other classes."""
    root = tmp_path / "imagenetv2"
    for i in range(1000):
        (root / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), i % 250, np.uint8)).save(root / str(i) / f"{i}.png")
    (entry,) = measure(root, attacks=("pgd",), iters=1, templates=("a {}",), n_samples=1)["datasets"]
    assert entry["name"] == "ImageNet-V2" and entry["classes"] == list(open_clip.IMAGENET_CLASSNAMES)
    stored = open_dataset(Data(shards=str(next((tmp_path / "cache" / "mmtard").glob("shards-*")))))
    assert {key.partition("-")[2]: label for key, label in zip(stored.keys, stored.labels.tolist())} == {
        f"{i}-{i}": i for i in range(1000)
    }
    (root / "999").rename(tmp_path / "999")
    root.rename(tmp_path / "imagenet")
    with pytest.raises(UserError, match=f"'{tmp_path / 'imagenet'}' has 999 classes, ImageNet has 1000"):
        measure(tmp_path / "imagenet", tmp_path / "other", attacks=("pgd",), iters=1)


def test_a_protocol_is_what_papers_agreed_on_and_gives_way_to_what_is_asked():
    fare = protocol("fare")
    assert (fare.eps, fare.attacks, fare.iters, fare.n_samples) == (
        (Fraction(2, 255), Fraction(4, 255)),
        ("apgd-ce", "apgd-t"),
        100,
        1000,
    )
    robustbench = protocol("robustbench")
    assert robustbench.radii("CIFAR10") == (Fraction(8, 255),) and robustbench.radii("ImageNet") == (Fraction(4, 255),)
    assert protocol("robustbench", [Fraction(1, 255)]).radii("CIFAR10") == (Fraction(1, 255),)
    tecoa = protocol("tecoa", all_samples=True, iters=None)
    assert (tecoa.step_size, tecoa.templates, tecoa.n_samples, tecoa.iters) == (
        Fraction(1, 255),
        ("This is a photo of a {}",),
        None,
        10,
    )
    assert protocol("quick", transfer=True).attacks[-1] == "transfer"


@pytest.mark.parametrize("asked, message", [
    ({"eps": [Fraction(0)]}, "--eps: 0 is no attack"),
    (
        {"eps": [Fraction(2)]},
        "--eps: 2 lets an attack replace the whole image, .* write it as a fraction such as 2/255",
    ),
    ({"eps": [Fraction(2, 255), Fraction(1)]}, "--eps: 1 lets"),
    ({"norm": "l2"}, "--norm: the radii of 'robustbench' are linf's, not l2's; give its own with --eps, such as 0.5"),
    (
        {"norm": "l2", "eps": [Fraction(1, 2)]},
        "--attacks: 'square' is written for linf, not l2; leave it out: --attacks apgd-ce apgd-t fab-t$",
    ),
])  # fmt: skip
def test_a_threat_that_does_not_fit_is_refused_when_it_is_asked_for(asked, message):
    with pytest.raises(UserError, match=message):
        protocol("robustbench", **asked)


def test_radii_and_attacks_that_fit_l2_are_taken():
    found = protocol("robustbench", [Fraction(1, 2), Fraction(3)], norm="l2", attacks=("apgd-ce", "fab-t"))
    assert (found.norm, found.radii("CIFAR10"), found.attacks) == (
        "l2",
        (Fraction(1, 2), Fraction(3)),
        ("apgd-ce", "fab-t"),
    )
    assert protocol("fare", norm="linf").norm == "linf"


def test_evaluations_of_other_settings_have_other_folders(root):
    """Names keyed by a rounded eps collide, and the second evaluation is then the first one's."""
    sources, model = datasets.find_datasets(str(root / "my-own_set")), Model(weights=str(root / "run"))
    (root / "run" / "checkpoints").mkdir(parents=True)
    asked = [
        protocol("quick", [Fraction(e)], **more)
        for e in ("1/255", "3/510")
        for more in ({}, {"norm": "l2"}, {"iters": 7}, {"seed": 1})
    ]
    outs = [default_out(model, p, sources, str(root / "my-own_set")) for p in asked]
    assert (
        len(set(outs)) == 8
        and outs[0].parent == root / "run" / "evaluations"
        and outs[0].name.startswith("quick-my-own_set-linf-1_255-")
    )
    checkpoint = default_out(Model(weights=str(root / "run" / "checkpoints" / "step-5")), asked[0], sources, str(root))
    assert checkpoint.parent == outs[0].parent and checkpoint.name.startswith("step-5-quick-")


def test_native_pixels_are_the_stored_ones(tmp_path):
    folder = write(tmp_path / "d", 3, size=(10, 14))
    dataset = open_dataset(Data(shards=str(folder / "test")))
    (batch,) = eval_batches(SampleReader(dataset, Native((10, 14))), [2, 0], 4)
    reader = Reader(dataset)
    stored = [np.asarray(decode(reader.image(i))).transpose(2, 0, 1) for i in (2, 0)]
    assert batch.images.shape == (2, 3, 10, 14) and (batch.images.numpy() == stored).all()


def test_datasets_are_read_as_the_flags_say(tmp_path):
    folder = write(tmp_path / "d", 3)
    (source,) = datasets.find_datasets(
        str(folder), reading={"label_key": "label", "caption_key": None, "allow_pipe": True}
    )
    assert (source.data.label_key, source.data.caption_key, source.data.allow_pipe) == ("label", None, True)


def test_a_folder_with_a_control_character_in_its_name_is_one_line(tmp_path):
    write(tmp_path / "root" / "ev\x1b[31mil", 4, size=(8, 8))
    with pytest.raises(UserError, match=r"shards: '.*ev.*31mil.*' holds the control character"):
        datasets.find_datasets(str(tmp_path / "root"))


def test_a_note_on_the_kind_of_data_that_is_no_text_is_none(tmp_path):
    folder = write(tmp_path / "plain", 4, size=(8, 8))
    (folder / "dataset_type.txt").write_bytes(b"\xff\xfe\x00")
    (source,) = datasets.find_datasets(str(folder))
    assert not source.captions
