"""Captions as classes: which there are and their embeddings, whatever the number of ranks that share the batch."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from mmtard.config import Model, validate
from mmtard.data.samples import Batch
from mmtard.losses import cross_entropy, kl
from mmtard.models import loading
from mmtard.training import class_targets
from mmtard.training.class_targets import CaptionTargets
from mmtard.zero_shot import ZeroShotHead

CAPTIONS = ["a red ring", "two dogs", "a red ring", "Zürich by night", "a blue cube", "two dogs", "a cow", "an owl"]
CLASSES = ["Zürich by night", "a blue cube", "a cow", "a red ring", "an owl", "two dogs"]
LABELS = [3, 5, 3, 0, 1, 5, 2, 4]


@pytest.fixture(scope="module")
def clips(vit):
    return {
        name: loading.load_clip(Model(arch=vit, weights="random"), where=name)
        for name in ("student", "clean", "robust")
    }


def batch(captions):
    n = len(captions)
    return Batch(
        torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.full((n,), -1), torch.arange(n), torch.arange(n), captions
    )


class Thread:
    """A rank among threads."""

    device = torch.device("cpu")

    def __init__(self, rank, box, barrier):
        self.rank, self.box, self.barrier = rank, box, barrier

    def all_gather(self, item):
        self.box[self.rank] = item
        self.barrier.wait(30)
        items = list(self.box)
        self.barrier.wait(30)
        return items

    def gather_numbers(self, numbers):
        return torch.stack(self.all_gather(numbers))


def alone():
    return Thread(0, [None], Barrier(1))


def ask(clips, shares, dtype=torch.float32):
    """For each rank's share of the captions, asked at the same time: (its heads, its labels)."""
    box, barrier = [None] * len(shares), Barrier(len(shares))

    def rank(r):
        captions = CaptionTargets(clips, Thread(r, box, barrier), dtype)
        (given,) = captions([batch(shares[r])])
        return captions.heads, given.labels

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(rank, range(len(shares))))


def test_logits_are_those_of_the_text_tower_in_double_precision(clips):
    ((heads, labels),) = ask(clips, [CAPTIONS])
    assert labels.tolist() == LABELS
    for name, clip in clips.items():
        z = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        tokens = open_clip.get_tokenizer(clip.name)(CLASSES)
        t = copy.deepcopy(clip.model).double().encode_text(tokens).detach().numpy()
        unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (z.double().numpy(), t)]
        expected = np.exp(clip.model.logit_scale.double().item()) * unit[0] @ unit[1].T
        assert np.allclose(heads[name](z).logits, expected, atol=2e-5)
    assert not torch.allclose(heads["clean"].class_embeddings, heads["robust"].class_embeddings), (
        "each model has its own text tower"
    )


def test_the_losses_are_those_of_the_global_batch_at_every_world_size(clips):
    g = torch.Generator().manual_seed(2)
    z = {name: torch.randn(8, 16, generator=g) for name in ("student", "clean", "robust")}

    def losses(world):
        """Per sample, in the order of the global batch, of which each rank has every world-th sample, in
        micro-batches of two.
        """
        out = torch.empty(8)
        for r, (heads, labels) in enumerate(ask(clips, [CAPTIONS[r::world] for r in range(world)])):
            for i in range(0, 8 // world, 2):
                mine = torch.arange(8)[r::world][i : i + 2]
                logits = {name: heads[name](embeddings[mine]).logits for name, embeddings in z.items()}
                assert logits["student"].shape == (2, len(CLASSES))
                kls = kl(logits["clean"], logits["student"]) + kl(logits["robust"], logits["student"])
                out[mine] = kls + cross_entropy(logits["student"], labels[i : i + 2])
        return out

    one = losses(1)
    assert torch.allclose(one, losses(2), rtol=1e-5) and torch.allclose(one, losses(4), rtol=1e-5)
    assert one.unique().numel() == 8


def test_ranks_get_the_same_bits_of_a_caption_that_several_have(clips):
    ranks = ask(clips, [CAPTIONS[:4], CAPTIONS[4:]])  # two dogs and more, embedded in batches of different sizes
    (first, _), (second, _) = ranks
    assert all(first[name].class_embeddings.equal(second[name].class_embeddings) for name in clips)


def test_a_batch_is_embedded_a_step_ahead_and_its_classes_wait_for_it(clips):
    captions, seen = CaptionTargets({"clean": clips["clean"]}, alone()), []

    def stream():
        for words in (["two dogs", "an owl"], ["a cow", "a cow"], ["a blue cube", "a red ring"]):
            seen.append(words)
            yield batch(words)

    expected = [clips["clean"].text_tower()(sorted(set(words))) for words in (["two dogs", "an owl"], ["a cow"])]
    classes = captions.heads["clean"]
    given = captions(stream())
    assert next(given).labels.tolist() == [1, 0] and len(seen) == 2, "the next one is embedded before this one is used"
    assert classes.class_embeddings.equal(expected[0])
    assert next(given).labels.tolist() == [0, 0] and classes.class_embeddings.equal(expected[1])
    assert len(list(given)) == 1


def test_under_bf16_the_text_towers_compute_in_bf16_and_give_float32(clips):
    (exact, labels), *_ = ask(clips, [CAPTIONS])
    (rough, same), *_ = ask(clips, [CAPTIONS], torch.bfloat16)
    for name in clips:
        a, b = exact[name].class_embeddings, rough[name].class_embeddings
        assert b.dtype == torch.float32 and not a.equal(b) and torch.allclose(a, b, atol=2e-2)
        assert torch.allclose(b.norm(dim=1), torch.ones(len(b)), atol=1e-5)
    assert labels.equal(same)


def test_captions_that_differ_past_the_context_are_told_once(clips):
    said = []
    captions = CaptionTargets({"clean": clips["clean"]}, alone(), say=said.append)
    list(captions(2 * [batch(["word " * 300 + str(i) for i in range(4)] + CAPTIONS)]))
    (line,) = said
    assert line.startswith("WARN captions of the first batch, clean: 3 of ") and "past the text tower's" in line


def test_the_image_tower_goes_its_own_way(clips):
    clip = copy.deepcopy(clips["clean"])
    captions = CaptionTargets({"clean": clip}, alone())
    clip.tower().cast(torch.bfloat16)
    list(captions([batch(CAPTIONS)]))
    parameters = dict(captions.towers["clean"].named_parameters())
    assert not any("visual" in name for name in parameters) and {p.dtype for p in parameters.values()} == {
        torch.float32
    }
    assert captions.heads["clean"].class_embeddings.dtype == torch.float32
    assert clip.model.visual is not None and not any(p.requires_grad for p in parameters.values())


def test_labels_pass_as_they_are(clips, ranks, tmp_path, tree):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    tree["data"]["classnames"] = str(names)
    head, through = class_targets.build_class_targets(
        validate(tree), tmp_path, {"student": clips["student"]}, SimpleNamespace(labels=np.array([0, 1, -1])), ranks
    )
    given = [batch(["x", "y"])]
    assert (
        through(given) is given
        and isinstance(head["student"], ZeroShotHead)
        and len(head["student"].class_embeddings) == 2
    )
