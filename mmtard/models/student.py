"""The student of a run: the start that is stored with it, and the tower that is trained, as `student` wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from open_clip.modified_resnet import ModifiedResNet
from torch.utils.checkpoint import checkpoint as computed_again

from ..config import Config, Model
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import discard, wait_for, why_not_written
from ..runs import checksums
from ..runs.checkpoints import read_weights
from . import batch_norm, loading, lora, weights
from .clip import START_FOLDER, WEIGHTS_FILE, Clip
from .image_tower import ImageTower, blocks


def start_model(config: Config, run: Path, resumed: bool, ranks: Ranks) -> Clip:
    """The pretrained model a run starts from, read from the run's own folder.

    The first rank of a new run fetches the source and writes it there, so that the run can be evaluated, exported and
    resumed without its source. The others wait until they see what it wrote. Collective.
    """
    folder = run / START_FOLDER
    saved: list[Clip] = []
    if config.student.lora:
        lora.require()
    if not resumed:
        ranks.run_on_first(lambda: saved.append(_save_start(config, run)))
    else:
        remedy = "restore it from a copy of the run, or train it anew in another run_dir"
        ranks.run_on_first(lambda: checksums.verify(run, START_FOLDER, remedy))
    if saved:  # it is what the folder holds, and need not be read again
        return saved[0]
    wait_for(folder / WEIGHTS_FILE)  # on the other nodes
    return loading.load_clip(Model(weights=str(folder)))


def _save_start(config: Config, run: Path) -> Clip:
    """Fetch the start, write it with its checksums, and return it as the run's folder gives it.

    Raises UserError where there is no room for it, and leaves none of it then.
    """
    clip = loading.load_clip(config.student, config.seed, "student")
    try:
        with checksums.renewed(run, START_FOLDER):
            clip.save(run / START_FOLDER)
    except OSError as error:
        discard(run / f"{START_FOLDER}.tmp")
        needed = sum(tensor.nbytes for tensor in clip.model.state_dict().values())
        raise UserError(why_not_written(run / START_FOLDER, error, needed)) from None
    return replace(clip, name=f"local-dir:{run / START_FOLDER}")


def trainable_tower(config: Config, clip: Clip, checkpoint: Path | None) -> ImageTower:
    """The tower to be trained, with the weights of a checkpoint folder where there is one.

    What is frozen does not require grad.
    """
    made = clip.tower()
    disable_dropout(made)
    if config.student.lora:
        lora.attach(made.visual, config.student.lora, made.layout, config.seed)
    if config.student.batch_norm == "synced":
        batch_norm.synchronise(made.visual, made.layout)
        made.frozen_batch_norm = False
    if config.engine.checkpoint_activations:
        checkpoint_activations(made)
    if checkpoint:
        weights.load_trained(made, read_weights(checkpoint), f"checkpoint '{checkpoint}'")
    return made


def disable_dropout(tower: ImageTower) -> None:
    """Switch off an architecture's own dropout, stochastic depth and patch dropout (timm's ConvNeXt and ViTamin).

    They draw from torch's global generator, whose state depends on ranks, micro-batches and restarts; a training must
    not.
    """
    for module in tower.modules():
        for chance in ("p", "drop_prob", "prob"):
            if type(module).__name__.endswith(("Dropout", "DropPath")) and isinstance(
                getattr(module, chance, None), float
            ):
                setattr(module, chance, 0.0)


def checkpoint_activations(tower: ImageTower, on: bool = True) -> None:
    """Keep of each block its input alone, and compute the rest again in the backward; or keep all, where not `on`.

    Raises UserError for towers that cannot.
    """
    visual = tower.visual
    tower.checkpointed = on
    if isinstance(visual, ModifiedResNet):  # open_clip's own switch does nothing there
        for block in blocks(tower):
            if not on:
                block.__dict__.pop("forward", None)
                continue
            # One and the same each time that it is switched on: a compiled graph is bound to it.
            if not hasattr(block, "forward_again"):
                block.forward_again = partial(computed_again, block.forward, use_reentrant=False)
            block.forward = block.forward_again
        return
    try:
        # open_clip only warns when a timm model has no such switch.
        getattr(visual, "trunk", visual).set_grad_checkpointing(on)
    except (AttributeError, AssertionError, NotImplementedError):
        raise UserError(
            f"engine.checkpoint_activations: a {type(getattr(visual, 'trunk', visual)).__name__} tower cannot; set it"
            " to false"
        ) from None


@contextmanager
def keeping_activations(tower: ImageTower) -> Iterator[None]:
    """Inside the block, a tower whose activations are checkpointed keeps all of them."""
    if not tower.checkpointed:
        yield
        return
    checkpoint_activations(tower, False)
    try:
        yield
    finally:
        checkpoint_activations(tower)
