"""Image-text retrieval: ranks by hand, recall against a sort in float64, images that are taken from their captions."""

import io

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image
from tiny_datasets import write

from mmtard.errors import UserError
from mmtard.evaluation import recall, retrieval


def test_ranks_of_three_images_and_four_captions_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])  # of images 0, 0, 1, 2
    # cosines, rows images: [1, .6, 0, .8], [0, .8, 1, .6], [.707, .990, .707, .990]
    of_image, of_caption = recall.ranks_of(images, texts, torch.tensor([0, 0, 1, 2]), block=2)
    assert of_image.tolist() == [1, 1, 2]  # the third's .990 is met by another's .990: a tie counts against it
    assert of_caption.tolist() == [1, 3, 1, 1]


def test_ranks_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(30, 8)), rng.normal(size=(90, 8))
    z, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, t))
    of = np.repeat(np.arange(30), 3)
    similarity = z @ t.T
    best = [list(of[np.argsort(-row)]).index(i) + 1 for i, row in enumerate(similarity)]
    theirs = [list(np.argsort(-similarity[:, j])).index(of[j]) + 1 for j in range(90)]
    of_image, of_caption = recall.ranks_of(torch.tensor(z).float(), torch.tensor(t).float(), torch.tensor(of), block=7)
    assert of_image.tolist() == best and of_caption.tolist() == theirs
    found = recall.recalls(of_image, of_caption)
    assert (
        found["image_to_text"]["5"]["accuracy"] == np.mean(np.array(best) <= 5)
        and found["text_to_image"]["10"]["n"] == 90
    )


def test_one_embedding_for_everything_finds_nothing():
    of_image, of_caption = recall.ranks_of(torch.ones(12, 4), torch.ones(12, 4) / 2, torch.arange(12))
    assert of_image.tolist() == of_caption.tolist() == [12] * 12


def test_nan_finds_nothing_and_takes_no_other_images_place():
    """NaN compares as false with everything: counted as nothing better, it would rank first."""
    nothing = torch.full((12, 4), torch.nan)
    assert [r.tolist() for r in recall.ranks_of(nothing, torch.eye(12, 4), torch.arange(12))] == [[12] * 12] * 2
    images, texts = torch.eye(4), torch.eye(4)
    images[1] = torch.nan
    assert [r.tolist() for r in recall.ranks_of(images, texts, torch.arange(4), block=3)] == [[1, 4, 1, 1]] * 2
    texts[2] = torch.nan
    of_image, of_caption = recall.ranks_of(images, texts, torch.arange(4))
    assert of_image.tolist() == [1, 4, 4, 1] and of_caption.tolist() == [1, 4, 4, 1]


def test_the_loss_is_cross_entropy_where_an_image_has_one_caption():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
    assert torch.allclose(retrieval.away(logits, torch.eye(5, dtype=torch.bool)), reference)
    p = np.exp(logits[0].numpy()) / np.exp(logits[0].numpy()).sum()
    own = torch.tensor([[True, False, True, False, False]])
    assert retrieval.away(logits[:1], own).item() == pytest.approx(-np.log(p[0] + p[2]))


CAPTIONS = ["a red square", "something green\na green noise", "the blue image", "a grey picture\n\nno colour at all"]


def test_attacked_images_lose_their_captions_whatever_the_batch_size(measure, tmp_path):
    folder = write(tmp_path / "flickr", 24, captions=lambda i: f"{CAPTIONS[i % 4]} number {i}")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (entry,) = measure(folder, n_samples=16, attacks=("apgd-ce",), iters=10, batch_size=5, restarts=2)["datasets"]
    assert entry["kind"] == "retrieval" and entry["n_total"] == 24 and entry["captions"] == 36
    assert entry["clean_all"]["image_to_text"]["1"]["n"] == 24 and entry["clean_all"]["text_to_image"]["1"]["n"] == 36
    assert len(entry["samples"]["ids"]) == 16 == entry["clean"]["image_to_text"]["1"]["n"]
    clean, attacked = (
        np.array(s["image_to_text_rank"]) for s in (entry["samples"]["clean"], entry["samples"]["eps"]["4/255"])
    )
    assert attacked.mean() > clean.mean() + 2 and entry["eps"]["4/255"]["recall"]["image_to_text"]["1"][
        "accuracy"
    ] == np.mean(attacked <= 1)
    assert [(line["check"], line["status"]) for line in entry["health"]] == [
        ("largest perturbation", "PASS"),
        ("range", "PASS"),
        ("NaN", "PASS"),
    ]
    (other,) = measure(
        folder, tmp_path / "other", n_samples=16, attacks=("apgd-ce",), iters=10, batch_size=16, restarts=2
    )["datasets"]
    assert other["samples"] == entry["samples"]


def test_an_image_that_cannot_be_read_and_its_captions_are_left_out(measure, tmp_path):
    """Its neighbour's image would be scored against its captions."""
    found = {}
    for name, n, truncated in (("damaged", 120, (5,)), ("whole", 120, ())):
        folder = write(
            tmp_path / name, n, size=(8, 8), captions=lambda i: f"picture {i}\nnumber {i}", truncated=truncated
        )
        (folder / "dataset_type.txt").write_text("retrieval\n")
        (found[name],) = measure(folder, tmp_path / f"{name}.out", attacks=("apgd-ce",), iters=1, n_samples=20)[
            "datasets"
        ]
    entry, whole = found["damaged"], found["whole"]
    assert (entry["n_total"], entry["captions"], entry["left_out"]) == (119, 238, 1) and (
        whole["n_total"],
        whole["captions"],
    ) == (120, 240)
    assert entry["clean_all"]["image_to_text"]["1"]["n"] == 119 and entry["clean_all"]["text_to_image"]["1"]["n"] == 238
    assert len(entry["samples"]["ids"]) == 20 and 5 not in entry["samples"]["ids"]
    assert entry["samples"]["keys"] == [f"s{i:04d}" for i in entry["samples"]["ids"]]
    assert [(line["check"], line["status"]) for line in entry["health"]][0] == ("every image was read", "WARN")


def test_recall_without_an_unreadable_image_is_that_of_the_others(exported, measure, tmp_path):
    folder = write(
        tmp_path / "damaged", 120, size=(32, 32), captions=lambda i: f"picture {i}\nnumber {i}", truncated=(5,)
    )
    (folder / "dataset_type.txt").write_text("retrieval\n")
    (entry,) = measure(folder, attacks=("apgd-ce",), iters=1)["datasets"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    shard = wds.WebDataset([str(folder / "test" / "0.tar")], shardshuffle=False)
    samples = [s for s in shard if s["__key__"] != "s0005"]
    images = torch.stack([preprocess(Image.open(io.BytesIO(s["png"]))) for s in samples])
    texts = [line for s in samples for line in s["txt"].decode().splitlines()]
    with torch.no_grad():
        z, t = model.eval().encode_image(images, normalize=True), model.encode_text(tokenizer(texts), normalize=True)
    order = (z @ t.T).argsort(1, descending=True) // 2
    theirs = [row.tolist().index(i) + 1 for i, row in enumerate(order)]
    ours = entry["samples"]["clean"]["image_to_text_rank"]
    assert (
        entry["samples"]["keys"] == [s["__key__"] for s in samples]
        and np.mean(np.array(ours) == theirs) > 0.95
        and len(set(theirs)) > 10
    )


def test_an_image_without_a_caption_is_named(measure, tmp_path):
    folder = write(tmp_path / "flickr", 3, captions=lambda i: "" if i == 1 else "a caption")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(UserError, match="'0.tar/s0001' has no caption; retrieval needs a .txt member"):
        measure(folder, attacks=("apgd-ce",))
