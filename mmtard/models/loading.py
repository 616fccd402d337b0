"""A CLIP from any source: tags, the hub, folders of open_clip or transformers, runs, files, or random weights."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor

from .. import config as settings
from ..config import Model
from ..config.model_errors import absent_weights, unknown_weights
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import refuse_special
from ..runs import checksums
from ..runs.checkpoints import read_resolved, read_weights
from . import lora
from .activation import trained_gelu, wanted_gelu
from .clip import CONFIG_FILE, START_FOLDER, Clip
from .model_config import architecture, build, check_model_config, check_preprocess
from .model_folder import as_clip, exported_folder, folder_config, in_names_of, read_folder
from .transformers_clip import (
    WEIGHTS as TRANSFORMERS_WEIGHTS,
    from_transformers,
    is_transformers_folder,
    open_clip_config,
)
from .unfilled import unfilled
from .weights import load_strictly, load_trained, read_state_dict, require_finite

HUB = "hf-hub:"


def load_clip(spec: Model, seed: int = 0, where: str = "student") -> Clip:
    """The open_clip model a `Model` setting describes, on the CPU in float32, every weight accounted for.

    Raises UserError naming `where` for an unknown source, a configuration with unknown keys, a wrong architecture,
    weights that do not fit (with the keys) or are not finite, or an activation (QuickGELU) that is not the one the
    weights were trained with.
    """
    if spec.ema and not _is_run(spec):
        raise UserError(
            f"{where}.ema: '{spec.weights}' is no run or checkpoint, which alone hold a moving average; leave ema out"
        )
    if Path(spec.weights).is_dir():
        refuse_special(Path(spec.weights))
    load = next(load for matches, load in SOURCES if matches(spec))
    return load(spec, seed, where)


def load_clip_on_all_ranks(spec: Model, ranks: Ranks, seed: int = 0, where: str = "student") -> Clip:
    """The same as `load_clip` on every rank. Collective.

    What must be fetched from elsewhere is fetched by the first rank alone; the others then find it in the cache. An
    error of the first rank is every rank's.
    """
    if not _is_fetched(spec):
        return load_clip(spec, seed, where)
    loaded: list[Clip] = []
    ranks.run_on_first(lambda: loaded.append(load_clip(spec, seed, where)))
    return loaded[0] if loaded else load_clip(spec, seed, where)


def load_skeleton(spec: Model, where: str) -> Clip:
    """The model a `Model` setting describes on the meta device: its shapes, no weights, and nothing downloaded."""
    source = Path(spec.weights)
    folder = next((f for f in (source, source / START_FOLDER) if (f / CONFIG_FILE).is_file()), None)
    if spec.arch is None and folder is None:
        raise UserError(
            f"{where}: '{spec.weights}' is not here and does not say its architecture; for this table, give"
            f" {where}.arch=ViT-L-14 or another"
        )
    if spec.arch is None:
        cfg, preprocess = folder_config(folder / CONFIG_FILE, where)
        with torch.device("meta"):
            return as_clip(build(cfg, preprocess), f"local-dir:{folder}", cfg)
    name = architecture(spec.arch, f"{where}.arch")
    tagged = spec.weights in open_clip.list_pretrained_tags_by_model(name)
    quick_gelu = wanted_gelu(name, spec, trained_gelu(name, spec.weights) if tagged else None, where)
    with torch.device("meta"):
        return _of_architecture(name, quick_gelu)


# ---------------------------------------------------------------- the sources


def _is_exported(spec: Model) -> bool:
    return (Path(spec.weights) / CONFIG_FILE).is_file()


def _is_transformers(spec: Model) -> bool:
    return is_transformers_folder(Path(spec.weights))


def _is_run(spec: Model) -> bool:
    return Path(spec.weights).is_dir() and not _is_exported(spec) and not _is_transformers(spec)


def _is_fetched(spec: Model) -> bool:
    """Whether the source, or that of its text tower, may come over the network."""
    row = next(load for matches, load in SOURCES if matches(spec))
    return row in (_from_hub, _from_tag) or (spec.text is not None and not Path(spec.text).exists())


def _from_hub(spec: Model, seed: int, where: str) -> Clip:
    repository = spec.weights.removeprefix(HUB)
    try:
        config = Path(huggingface_hub.hf_hub_download(repository, CONFIG_FILE))
        weights = Path(download_pretrained_from_hf(repository))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{where}.weights: cannot load '{spec.weights}': {' '.join(str(error).split())}") from None
    return _no_arch(spec, where, read_folder(config, weights, spec.weights, where))


def _from_exported(spec: Model, seed: int, where: str) -> Clip:
    return _no_arch(spec, where, exported_folder(Path(spec.weights), where))


def _from_transformers(spec: Model, seed: int, where: str) -> Clip:
    folder, where_weights = Path(spec.weights), f"{where}.weights"
    cfg, preprocess = open_clip_config(folder, where_weights)
    check_model_config(cfg, where_weights, spec.weights)
    check_preprocess(preprocess, where_weights, spec.weights)
    with unfilled():
        clip = as_clip(build(cfg, preprocess), f"transformers:{folder}", cfg)
    weights = next(folder / name for name in TRANSFORMERS_WEIGHTS if (folder / name).is_file())
    state = from_transformers(read_state_dict(weights, where))
    load_strictly(clip.model, in_names_of(clip.model, state), f"{where_weights} '{weights}'", "check the folder")
    return _no_arch(spec, where, clip)


def _from_run(spec: Model, seed: int, where: str) -> Clip:
    def read(run: Path, checkpoint: Path) -> tuple[Path, Path, dict[str, Tensor]]:
        return run, checkpoint, read_weights(checkpoint, spec.ema)

    run, checkpoint, weights = read_resolved(Path(spec.weights), read)
    checksums.verify(run, START_FOLDER, "restore it from a copy, or train the run anew")
    clip = exported_folder(run / START_FOLDER, where)
    tower = clip.tower()
    if lora.is_adapter(weights):
        lora.attach(tower.visual, settings.load(run / "config.yaml").student.lora, tower.layout)
        load_trained(tower, weights, f"checkpoint '{checkpoint}'")
        lora.merge(tower.visual)
    else:
        load_strictly(tower, weights, f"checkpoint '{checkpoint}'")
    return _no_arch(spec, where, clip)


def _absent(spec: Model, seed: int, where: str) -> Clip:
    raise absent_weights(where, spec.weights)


def _from_seed(spec: Model, seed: int, where: str) -> Clip:
    name = architecture(spec.arch, f"{where}.arch", spec.weights)
    with torch.random.fork_rng(devices=[]):
        # The setting's name is part of the seed, so that a random teacher differs from a random student.
        torch.manual_seed(zlib.crc32(f"{seed} {where}".encode()))
        return _of_architecture(name, wanted_gelu(name, spec, None, where))


def _from_file(spec: Model, seed: int, where: str) -> Clip:
    name, path = architecture(spec.arch, f"{where}.arch", spec.weights), Path(spec.weights)
    state = from_transformers(read_state_dict(path, where))
    whole = any(k.startswith("visual.") for k in state) and any(not k.startswith("visual.") for k in state)
    if not whole:
        return _with_text_of(spec, state, where)
    if spec.text is not None:
        raise UserError(f"{where}.text: '{path}' already holds a text tower; leave text out")
    if spec.quick_gelu is None and not spec.arch.endswith(".json") and not name.endswith("quickgelu"):
        raise UserError(
            f"{where}.quick_gelu: the file '{path}' does not say which activation it was trained with; set quick_gelu"
            " to true (OpenAI's) or false"
        )
    quick_gelu = wanted_gelu(name, spec, None, where)
    with unfilled():
        clip = _of_architecture(name, quick_gelu)
    load_strictly(clip.model, in_names_of(clip.model, state), f"{where}.weights '{path}'")
    return clip


def _from_tag(spec: Model, seed: int, where: str) -> Clip:
    name = architecture(spec.arch, f"{where}.arch", spec.weights)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if spec.weights not in tags:
        raise unknown_weights(where, spec.weights, spec.arch, tags)
    gelu = wanted_gelu(name, spec, trained_gelu(name, spec.weights), where)
    return _pretrained(name, spec.weights, gelu, where)


# The first row that matches a `Model` setting loads it.
SOURCES: tuple[tuple[Callable[[Model], bool], Callable[[Model, int, str], Clip]], ...] = (
    (lambda spec: spec.weights.startswith(HUB), _from_hub),
    (_is_exported, _from_exported),
    (_is_transformers, _from_transformers),
    (_is_run, _from_run),
    (lambda spec: "/" in spec.weights and not Path(spec.weights).exists(), _absent),
    (lambda spec: spec.weights == "random", _from_seed),
    (lambda spec: Path(spec.weights).is_file(), _from_file),
    (lambda spec: True, _from_tag),  # whatever is nothing else
)


def _no_arch(spec: Model, where: str, clip: Clip) -> Clip:
    """The same model. Raises UserError when the setting says what the source itself says already."""
    if spec.arch is not None:
        raise UserError(f"{where}.arch: '{spec.weights}' brings its own architecture; leave arch out")
    if spec.quick_gelu is not None and spec.quick_gelu != bool(clip.config["model_cfg"].get("quick_gelu", False)):
        raise UserError(
            f"{where}.quick_gelu: {spec.quick_gelu}, but '{spec.weights}' was trained with quick_gelu"
            f" {not spec.quick_gelu}; leave it out"
        )
    return clip


# ---------------------------------------------------------------- models


def _of_architecture(name: str, quick_gelu: bool) -> Clip:
    """An architecture of open_clip's list with random weights."""
    cfg = {**open_clip.get_model_config(name), "quick_gelu": quick_gelu}
    return as_clip(build(cfg), name, cfg)


def _pretrained(name: str, tag: str, quick_gelu: bool, where: str) -> Clip:
    """An architecture with the weights of one of open_clip's own tags."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # decided by wanted_gelu
        logging.disable(logging.ERROR)  # what open_clip logs it also raises
        try:
            with unfilled():  # open_clip loads strictly, too
                model = open_clip.create_model(name, pretrained=tag, pretrained_text=False, quick_gelu=quick_gelu)
        except (RuntimeError, OSError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{where}.weights: cannot load '{tag}' of {name}: {why}; without internet, fetch them elsewhere "
                "first and set HF_HOME, or name a file"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
    require_finite(model.state_dict(), f"weights '{tag}' of {name}")
    return as_clip(model, name, {**open_clip.get_model_config(name), "quick_gelu": quick_gelu})


def _with_text_of(spec: Model, tower: dict[str, Tensor], where: str) -> Clip:
    """An image tower's weights beside the text tower of another source."""
    if spec.text is None:
        raise UserError(
            f"{where}.text: '{spec.weights}' holds an image tower alone; name the source of its text tower, e.g."
            " text: openai"
        )
    clip = load_clip(spec.model_copy(update={"weights": spec.text, "text": None}), where=f"{where}.text")
    state = {k.removeprefix("visual."): v for k, v in tower.items()}
    load_strictly(clip.model.visual, state, f"{where}.weights '{spec.weights}'")
    return clip
