"""Contrastive pretraining of a tiny CLIP on captions, with open_clip's model and loss."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from ..config import Data
from ..data.class_names import names_of
from ..data.dataset import open_dataset
from ..data.images import decode
from ..data.reader import Reader
from ..errors import UserError
from ..folders import SETTINGS, is_kept, publish_folder, read_settings

VERSION = 1  # one more where the same arguments give other weights; tests/examples/test_versions.py asks
ARCHITECTURE = Path(__file__).with_name("tiny_clip.json")
PROMPT = "a photo of a {}"


@dataclass(frozen=True)
class Pretraining:
    """What is pretrained, for how long, and at which peak learning rate (one cycle of AdamW)."""

    architecture: Path = ARCHITECTURE
    steps: int = 300
    batch_size: int = 256
    lr: float = 1e-3
    seed: int = 0

    def settings(self, data: Path) -> dict:
        """Return everything that decides the weights, ready for JSON; a hash stands for the architecture."""
        own = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "seed": self.seed}
        architecture = hashlib.sha256(self.architecture.read_bytes()).hexdigest()[:16]
        made = read_settings(data) if (data / SETTINGS).exists() else open_dataset(_train_of(data)).fingerprint
        return {**own, "architecture": architecture, "data": made, "version": VERSION}


def pretrain(
    data: Path,
    out: Path,
    how: Pretraining = Pretraining(),
    splits: tuple[str, ...] = ("test", "zeroshot"),
    progress: bool = True,
    keep: bool = False,
) -> dict[str, float]:
    """Train a CLIP on `data/train` and write `out/<architecture>.safetensors`, with its model config beside it.

    Returns and prints the clean accuracy, in [0, 1], on the other `splits` of `data`. The same arguments, number of
    threads and kind of device give the same weights; work already done with them is not repeated. Raises as
    `read_split`, and UserError where it would replace what `keep` asks to keep.
    """
    data, out, architecture = Path(data), Path(out), how.architecture
    settings, done = how.settings(data), read_settings(out)
    made = done and done["made_with"]
    if done is not None and (made == settings or keep and is_kept(out, made, settings)):
        return done["accuracy"]

    open_clip.add_model_config(architecture)
    tokenizer = open_clip.get_tokenizer(architecture.stem)
    images, _, captions, _ = read_split(data / "train")
    measured = {split: read_split(data / split) for split in splits}  # before the work that damage there would undo
    if len(sizes := {tuple(one.shape[2:]) for one in (images, *(split[0] for split in measured.values()))}) > 1:
        raise RuntimeError(f"images of several sizes: {sizes}")
    with torch.random.fork_rng(devices=[]), _progress_bar(progress) as bar:
        torch.manual_seed(how.seed)
        model = open_clip.CLIP(**json.loads(architecture.read_text())).to(_device())
        _train(model, images, tokenizer(captions), how, bar)
    model.eval()
    accuracy = {split: _accuracy(model, tokenizer, *measured[split]) for split in splits}
    with publish_folder(out, {"made_with": settings, "accuracy": accuracy}) as partial:
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / f"{architecture.stem}.safetensors")
        shutil.copy(architecture, partial / architecture.name)
    if progress:
        found = ", ".join(f"{split} {100 * value:.1f} %" for split, value in accuracy.items())
        Console().print(f"{architecture.stem}, clean accuracy: {found}")
    return accuracy


def _train_of(data: Path) -> Data:
    return Data(shards=str(data / "train"))


def read_split(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Decode all of a split: images [N,3,H,W] uint8, labels [N] int64, captions [N], class names [C].

    The images have one size. Of a sample's captions it is the first, without one the prompt of its class. Raises
    DecodeError for an image that cannot be read, RuntimeError for images of several sizes, and UserError for an image
    without a label and for one whose class has no name.
    """
    dataset = open_dataset(Data(shards=str(folder)))
    names = names_of(dataset, folder / "classnames.txt", "data")
    for i in np.flatnonzero(dataset.labels < 0)[:1].tolist():
        name, problem = dataset.name(i), dataset.label_problem(i)
        raise UserError(f"data: '{name}' of '{folder}': {problem}; give it one, or leave it out")
    reader, images, captions = Reader(dataset), [], []
    shards = sorted(range(len(dataset.paths)), key=lambda shard: dataset.paths[shard])
    ids = [i for shard in shards for i in dataset.shard_range(shard)]
    labels = dataset.labels[ids]
    for i, label in zip(ids, labels.tolist()):
        images.append(torch.from_numpy(np.array(decode(reader.image(i)))).permute(2, 0, 1))
        captions.append(next(iter(reader.captions(i)), PROMPT.format(names[label])))
    return torch.stack(images), torch.from_numpy(labels), captions, names


def _progress_bar(shown: bool) -> Progress:
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", loss, TimeRemainingColumn())
    return Progress(*columns, disable=not shown)


def _train(model: open_clip.CLIP, images: torch.Tensor, texts: torch.Tensor, how: Pretraining, bar: Progress) -> None:
    """Train in place on images [N,3,H,W] uint8 and their tokens [N,L], in batches of a new shuffle each epoch."""
    optimizer, schedule = _optimizer(model, how)
    loss_fn = open_clip.ClipLoss()
    task = bar.add_task("pretraining", total=how.steps, loss=float("nan"))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(how.steps):
        if len(order) < how.batch_size:
            order = torch.cat([order, torch.randperm(len(images))])
        batch, order = order[: how.batch_size], order[how.batch_size :]
        z_image = _embed_images(model, images[batch])
        z_text = F.normalize(model.encode_text(texts[batch].to(z_image.device)), dim=-1)
        loss = loss_fn(z_image, z_text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update(task, advance=1, loss=loss.item())


def _optimizer(model: open_clip.CLIP, how: Pretraining):
    """AdamW without weight decay on gains and biases, and its one-cycle schedule."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.lr, total_steps=how.steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule


def _embed_images(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """L2-normalised embeddings [B,D] of images [B,3,H,W] uint8."""
    device = model.logit_scale.device
    mean, std = (
        torch.tensor(value, device=device).view(3, 1, 1) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    return model.encode_image((images.to(device).float() / 255 - mean) / std, normalize=True)


def _device() -> torch.device:
    """Where it is trained: on a GPU where there is one. The weights are the same again on the same kind of device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _accuracy(
    model: open_clip.CLIP, tokenizer, images: torch.Tensor, labels: torch.Tensor, _: list[str], names: list[str]
) -> float:
    """The share of a split's images, in [0, 1], that are nearest to the prompt of their own class."""
    tokens = tokenizer([PROMPT.format(name) for name in names]).to(model.logit_scale.device)
    texts = model.encode_text(tokens, normalize=True)
    predictions = torch.cat([(_embed_images(model, batch) @ texts.T).argmax(1).cpu() for batch in images.split(500)])
    return (predictions == labels).float().mean().item()
