"""Contrastive pretraining of a tiny CLIP on captions, with open_clip's model and loss."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import webdataset as wds
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from ..files import publish_folder, read_settings

ARCHITECTURE = Path(__file__).with_name("tiny_clip.json")
PROMPT = "a photo of a {}"


def read_split(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """All of a split, decoded: images [N,3,H,W] uint8, labels [N] int64, captions [N], class names [C].

    Images of one size. A sample without a caption has the prompt of its class for one.
    """
    shards, names = (
        sorted(str(path) for path in folder.glob("*.tar")),
        (folder / "classnames.txt").read_text().splitlines(),
    )
    images, labels, captions = [], [], []
    for sample in wds.WebDataset(shards, shardshuffle=False, nodesplitter=None).decode("rgb8"):
        image = next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample)
        images.append(torch.from_numpy(image.copy()).permute(2, 0, 1))
        labels.append(sample["cls"])
        captions.append(sample.get("txt") or PROMPT.format(names[sample["cls"]]))
    return torch.stack(images), torch.tensor(labels), captions, names


def _embed_images(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
    """L2-normalised embeddings [B,D] of images [B,3,H,W] uint8."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return model.encode_image((images.float() / 255 - mean) / std, normalize=True)


@torch.no_grad()
def _accuracy(model: open_clip.CLIP, tokenizer, folder: Path) -> float:
    images, labels, _, names = read_split(folder)
    texts = model.encode_text(tokenizer([PROMPT.format(name) for name in names]), normalize=True)
    predictions = torch.cat([(_embed_images(model, batch) @ texts.T).argmax(1) for batch in images.split(500)])
    return (predictions == labels).float().mean().item()


def _train(
    model: open_clip.CLIP,
    images: torch.Tensor,
    texts: torch.Tensor,
    steps: int,
    batch_size: int,
    lr: float,
    bar: Progress,
) -> None:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed), dict(params=others, weight_decay=0.0)], lr=lr, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    loss_fn = open_clip.ClipLoss()
    task = bar.add_task("pretraining", total=steps, loss=float("nan"))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images))])
        batch, order = order[:batch_size], order[batch_size:]
        z_image, z_text = _embed_images(model, images[batch]), F.normalize(model.encode_text(texts[batch]), dim=-1)
        loss = loss_fn(z_image, z_text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update(task, advance=1, loss=loss.item())


def pretrain(
    data: Path, out: Path, *, architecture: Path = ARCHITECTURE, splits: tuple[str, ...] = ("test", "zeroshot"), steps: int = 300, batch_size: int = 256,
    lr: float = 1e-3, seed: int = 0, progress: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Trains the CLIP of a model config on `data/train` and writes its whole state_dict to `out/<architecture>.safetensors`, and the config beside it.

    Returns and prints the clean accuracy on the other `splits` of `data`, in [0,1]. The same arguments and number of threads give
    the same weights; work already done with them is not repeated.
    """
    data, out = Path(data), Path(out)
    settings = dict(steps=steps, batch_size=batch_size, lr=lr, seed=seed, data=read_settings(data))
    settings["code"] = hashlib.sha256(Path(__file__).read_bytes() + architecture.read_bytes()).hexdigest()[:16]
    done = read_settings(out)
    if done is not None and done["made_with"] == settings:
        return done["accuracy"]

    open_clip.add_model_config(architecture)
    tokenizer = open_clip.get_tokenizer(architecture.stem)
    images, _, captions, _ = read_split(data / "train")
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", loss_column, TimeRemainingColumn())
    with torch.random.fork_rng(devices=[]), Progress(*columns, disable=not progress) as bar:
        torch.manual_seed(seed)
        model = open_clip.CLIP(**json.loads(architecture.read_text()))
        _train(model, images, tokenizer(captions), steps, batch_size, lr, bar)
    model.eval()
    accuracy = {split: _accuracy(model, tokenizer, data / split) for split in splits}
    with publish_folder(out, dict(made_with=settings, accuracy=accuracy)) as partial:
        weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, partial / f"{architecture.stem}.safetensors")
        shutil.copy(architecture, partial / architecture.name)
    if progress:
        Console().print(
            f"{architecture.stem}, clean accuracy: "
            + ", ".join(f"{split} {100 * value:.1f} %" for split, value in accuracy.items())
        )
    return accuracy
