"""A CLIP from any source: open_clip tags, the hub, exported folders, runs, files, or random weights."""

from __future__ import annotations

import difflib
import json
import logging
import warnings
import zlib
from pathlib import Path

import open_clip
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

from .. import config as settings
from ..config import Model
from ..errors import UserError
from ..runs.checkpoints import read_weights, resolve
from . import lora
from .clip import CONFIG_FILE, START_FOLDER, WEIGHTS_FILE, Clip
from .weights import load_strictly, load_trained, read_state_dict


def load_clip(spec: Model, seed: int = 0, where: str = "student") -> Clip:
    """The open_clip model a `Model` setting describes, on the CPU in float32, every weight accounted for.

    Raises UserError naming `where` for an unknown source, a wrong architecture, weights that do not fit (with the keys), or an
    activation (QuickGELU) that is not the one the weights were trained with.
    """
    source = Path(spec.weights)
    if spec.ema and not (source.is_dir() and not (source / CONFIG_FILE).is_file()):
        raise UserError(
            f"{where}.ema: '{spec.weights}' is no run or checkpoint, which alone hold a moving average; leave ema out"
        )
    if spec.weights.startswith("hf-hub:"):
        return _no_arch(spec, where, _from_open_clip(spec.weights, where))
    if (source / CONFIG_FILE).is_file():
        return _no_arch(spec, where, _from_open_clip(f"local-dir:{source}", where))
    if source.is_dir():
        return _no_arch(spec, where, _from_run(source, spec.ema))
    if "/" in spec.weights and not source.exists():
        raise UserError(
            f"{where}.weights: '{spec.weights}' does not exist; correct the path, or make it first if it is a run's folder"
        )
    if spec.arch is None:
        raise UserError(
            f"{where}.arch: weights '{spec.weights}' do not name their architecture; set it, e.g. arch: ViT-B-32"
        )
    name = _architecture(spec.arch, where)
    if spec.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {where}".encode()))  # a teacher is not its student
            return _create(name, quick_gelu=_wanted_gelu(name, spec.quick_gelu, None, spec.weights, where))
    if source.is_file():
        return _from_file(source, name, spec, where)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if spec.weights not in tags:
        raise UserError(
            f"{where}.weights: '{spec.weights}' is neither a file, a folder, hf-hub:..., 'random' nor a tag of {spec.arch}"
            f" (tags: {', '.join(tags) or 'none'})"
        )
    trained = bool(open_clip.get_pretrained_cfg(name, spec.weights).get("quick_gelu", False))
    return _create(
        name, pretrained=spec.weights, quick_gelu=_wanted_gelu(name, spec.quick_gelu, trained, spec.weights, where)
    )


def load_skeleton(spec: Model, where: str) -> Clip:
    """The model a `Model` setting describes on the meta device: its shapes, no weights, and nothing downloaded."""
    source = Path(spec.weights)
    folder = next((f for f in (source, source / START_FOLDER) if (f / CONFIG_FILE).is_file()), None)
    if spec.arch is None and folder is None:
        raise UserError(
            f"{where}: '{spec.weights}' is not here and does not say its architecture; for this table, give {where}.arch=ViT-L-14 or another"
        )
    name, gelu = f"local-dir:{folder}", None
    if spec.arch is not None:
        name = _architecture(spec.arch, where)
        tagged = spec.weights in open_clip.list_pretrained_tags_by_model(name)
        trained = bool(open_clip.get_pretrained_cfg(name, spec.weights).get("quick_gelu", False)) if tagged else None
        gelu = _wanted_gelu(name, spec.quick_gelu, trained, spec.weights, where)
    with torch.device("meta"):
        return _unloaded(name, gelu)


def _no_arch(spec: Model, where: str, clip: Clip) -> Clip:
    if spec.arch is not None:
        raise UserError(f"{where}.arch: '{spec.weights}' brings its own architecture; leave arch out")
    if spec.quick_gelu is not None and spec.quick_gelu != bool(clip.config["model_cfg"].get("quick_gelu", False)):
        raise UserError(
            f"{where}.quick_gelu: {spec.quick_gelu}, but '{spec.weights}' was trained with quick_gelu {not spec.quick_gelu}; leave it out"
        )
    return clip


def _architecture(arch: str, where: str) -> str:
    if not arch.endswith(".json"):
        name = arch.replace("/", "-")
        if name not in open_clip.list_models():
            near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            raise UserError(
                f"{where}.arch: open_clip has no architecture '{arch}'" + (f"; near: {', '.join(near)}" if near else "")
            )
        return name
    path = Path(arch)
    try:
        cfg = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}.arch: cannot read model config '{arch}': {error}") from None
    if not isinstance(cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= cfg.keys():
        raise UserError(
            f"{where}.arch: '{arch}' is no open_clip model config; it needs embed_dim, vision_cfg and text_cfg"
        )
    known = open_clip.get_model_config(path.stem)
    if known is not None and known != cfg:
        raise UserError(f"{where}.arch: open_clip already has an architecture '{path.stem}'; rename '{arch}'")
    open_clip.add_model_config(path)
    return path.stem


def _wanted_gelu(name: str, asked: bool | None, trained: bool | None, weights: str, where: str) -> bool:
    of_arch = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    wanted = asked if asked is not None else trained if trained is not None and not of_arch else of_arch
    if trained is not None and wanted != trained:
        raise UserError(
            f"{where}: weights '{weights}' were trained with quick_gelu {str(trained).lower()}, but "
            f"{'quick_gelu' if asked is not None else 'arch ' + name} asks for {str(wanted).lower()}; leave quick_gelu out and name the plain architecture"
        )
    return wanted


def _create(name: str, quick_gelu: bool, pretrained: str | None = None) -> Clip:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # decided by _wanted_gelu
        logging.disable(logging.WARNING)  # open_clip's that weights are random: they were asked for, or come next
        try:
            model = open_clip.create_model(name, pretrained=pretrained, pretrained_text=False, quick_gelu=quick_gelu)
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot load weights '{pretrained}' of {name}: {' '.join(str(error).split())}") from None
        finally:
            logging.disable(logging.NOTSET)
    return Clip(
        model,
        name,
        {
            "model_cfg": {**open_clip.get_model_config(name), "quick_gelu": quick_gelu},
            "preprocess_cfg": _preprocess(model),
        },
    )


def _unloaded(name: str, quick_gelu: bool | None) -> Clip:
    logging.disable(logging.WARNING)  # that its weights are random
    try:
        model = open_clip.create_model(
            name, load_weights=False, device="meta", **({} if quick_gelu is None else {"quick_gelu": quick_gelu})
        )
    finally:
        logging.disable(logging.NOTSET)
    return Clip(model, name, {"preprocess_cfg": _preprocess(model)})


def _from_open_clip(name: str, where: str) -> Clip:
    try:
        model = open_clip.create_model(name, require_pretrained=True)
        kind, _, at = name.partition(":")
        described = Path(at) / CONFIG_FILE if kind == "local-dir" else Path(hf_hub_download(at, CONFIG_FILE))
        cfg = json.loads(described.read_text())["model_cfg"]
        if kind == "local-dir" and (Path(at) / WEIGHTS_FILE).is_file():
            # open_clip itself would stretch positional embeddings of another size to fit, without a word.
            load_strictly(model, load_file(Path(at) / WEIGHTS_FILE), f"{where}.weights '{at}'")
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{where}.weights: cannot load '{name}': {' '.join(str(error).split())}") from None
    return Clip(model, name, {"model_cfg": cfg, "preprocess_cfg": _preprocess(model)})


def _from_run(folder: Path, ema: bool) -> Clip:
    run, checkpoint = resolve(folder)
    clip = _from_open_clip(f"local-dir:{run / START_FOLDER}", "weights")
    weights, tower = read_weights(checkpoint, ema), clip.tower()
    if lora.is_adapter(weights):
        lora.attach(tower.visual, settings.load(run / "config.yaml").student.lora, tower.layout)
        load_trained(tower, weights, f"checkpoint '{checkpoint}'")
        lora.merge(tower.visual)
    else:
        load_strictly(tower, weights, f"checkpoint '{checkpoint}'")
    return clip


def _from_file(path: Path, name: str, spec: Model, where: str) -> Clip:
    state = read_state_dict(path, where)
    if any(k.startswith("visual.") for k in state) and any(not k.startswith("visual.") for k in state):
        if spec.text is not None:
            raise UserError(f"{where}.text: '{path}' already holds a text tower; leave text out")
        if spec.quick_gelu is None and not spec.arch.endswith(".json") and not name.endswith("quickgelu"):
            raise UserError(
                f"{where}.quick_gelu: the file '{path}' does not say which activation it was trained with; set quick_gelu to true (OpenAI's) or false"
            )
        clip = _create(name, quick_gelu=_wanted_gelu(name, spec.quick_gelu, None, spec.weights, where))
        load_strictly(clip.model, state, f"{where}.weights '{path}'")
        return clip
    if spec.text is None:
        raise UserError(
            f"{where}.text: '{path}' holds an image tower alone; name the source of its text tower, e.g. text: openai"
        )
    clip = load_clip(spec.model_copy(update={"weights": spec.text, "text": None}), where=f"{where}.text")
    load_strictly(
        clip.model.visual, {k.removeprefix("visual."): v for k, v in state.items()}, f"{where}.weights '{path}'"
    )
    return clip


def _preprocess(model: nn.Module) -> dict:
    cfg = dict(open_clip.model.get_model_preprocess_cfg(model))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()}
