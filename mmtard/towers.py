"""open_clip models: strict loading from every source, the image tower with its normalisation, and class embeddings.

A `Clip` is one whole open_clip model with what is needed to write it down again. Only its `ImageTower` is trained; the text
side is asked once for class embeddings.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from . import config as settings, lora
from .checkpoint import read_weights, resolve, save_tensors
from .config import Model
from .errors import UserError
from .views import Views

CONFIG_FILE, WEIGHTS_FILE, START_FOLDER = "open_clip_config.json", "open_clip_model.safetensors", "start"


class ImageTower(nn.Module):
    """An open_clip image tower that takes pixels: resizing and normalisation live in its forward.

    images [B,3,H,W] float32 in [0,1], any H and W -> embeddings [B,D] float32, not normalised; with `tokens`, also those of the
    P patches, [B,P,D], brought to the same space. Other sizes than `image_size` are resized inside (bicubic, no antialias).
    `autocast`: the dtype in which the tower runs while its weights stay float32, or None.
    """

    def __init__(self, visual: nn.Module, mean, std):
        super().__init__()
        self.visual = visual
        size = visual.image_size
        self.image_size: int = size[0] if isinstance(size, (tuple, list)) else size
        self.autocast: torch.dtype | None = None
        self.dtype = torch.float32  # of the weights, and so of the tower's input
        self.views = Views()
        self.frozen_batch_norm = True
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if self.has_tokens and _project_tokens not in visual._forward_hooks.values():
            # As a hook, it finds the projection's weight gathered where the tower is sharded.
            visual.register_forward_hook(_project_tokens)

    def forward(self, images: Tensor, tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", align_corners=False)
        x = ((images - self.mean) / self.std).to(self.dtype)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.has_tokens:
                self.visual.output_tokens = tokens
            z = self.visual(x)
        if isinstance(z, tuple) and not tokens:  # CoCa's tower always gives the tokens of its own decoder, too
            z = z[0]
        return tuple(_at_least_float32(t) for t in z) if tokens else _at_least_float32(z)

    @property
    def has_tokens(self) -> bool:
        """Whether the forward can give the patches' tokens: that of a ViT whose embedding is a projected token or their mean."""
        v = self.visual
        return isinstance(v, VisionTransformer) and v.attn_pool is None and v.proj is not None and v.pool_type != "none"

    def cast(self, dtype: torch.dtype) -> "ImageTower":
        """The same tower with its weights (and so its arithmetic) in `dtype`; normalisation stays float32."""
        self.visual.to(dtype)
        self.dtype = dtype
        return self

    def train(self, mode: bool = True) -> "ImageTower":
        """Training mode for everything but frozen batch norm, whose statistics stay those of the pretrained model: clean and
        adversarial images, ranks and micro-batches then all see one and the same network."""
        super().train(mode)
        for module in self.modules():
            if self.frozen_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def _project_tokens(visual: VisionTransformer, _, output):
    return (output[0], output[1] @ visual.proj) if visual.output_tokens else output


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype != torch.float64 else z


class TextTower(nn.Module):
    """An open_clip model without its image tower, and its own tokenizer: N texts -> embeddings [N,D] float32, normalised, without gradient."""

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], Tensor]):
        super().__init__()
        self.model = copy.copy(model)
        self.model._modules = {name: module for name, module in model._modules.items() if name != "visual"}
        self.tokenize = tokenize
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, texts: list[str], batch_size: int = 256) -> Tensor:
        device = next(self.parameters()).device
        chunks = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat([F.normalize(self.model.encode_text(self.tokenize(c).to(device)).float(), dim=-1) for c in chunks])


def require_tokens(tower: ImageTower, where: str) -> None:
    """UserError when the tower cannot give the patch tokens that the method reads."""
    if not tower.has_tokens:
        raise UserError(f"{where}: the method reads a ViT's patch tokens, which a {type(tower.visual).__name__} does not give; choose a ViT or another method")


@dataclass
class Clip:
    """A whole open_clip model and the folder configuration that describes it."""

    model: nn.Module
    name: str  # what open_clip calls it: an architecture, local-dir:..., or hf-hub:...
    config: dict  # {"model_cfg": ..., "preprocess_cfg": ...}, the content of open_clip_config.json

    @property
    def logit_scale(self) -> float:
        """exp of the model's logit scale: the factor on cosines, 100 for OpenAI's models."""
        return float(self.model.logit_scale.detach().double().exp())

    def sha256(self, image: bool) -> str:
        """The digest of the image tower's weights and buffers (`image`), or of all the others; by name, in float32."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if name.startswith("visual.") == image:
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tower(self) -> ImageTower:
        cfg = self.config["preprocess_cfg"]
        return ImageTower(self.model.visual, cfg["mean"], cfg["std"])

    def text_tower(self) -> TextTower:
        return TextTower(self.model, self.tokenizer())

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The model's own: N texts -> token ids int64 [N,L]. Raises UserError for one of Hugging Face that is not at hand."""
        try:
            return open_clip.get_tokenizer(self.name)
        except (OSError, ValueError, ImportError) as error:
            name = self.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
            raise UserError(f"{self.name}: its tokenizer '{name}' is not at hand ({' '.join(str(error).split())}); download it once") from None

    def class_embeddings(self, classnames: list[str], templates: list[str], device="cpu") -> Tensor:
        """t_k, [C,D] float32 normalised, on the CPU: each prompt's embedding normalised, averaged over the templates, normalised."""
        prompts = [t.replace("{}", name) for name in classnames for t in templates]
        text = self.text_tower().to(device)
        z = text(prompts).cpu()
        text.cpu()  # the model's own weights, which went along
        return F.normalize(z.view(len(classnames), len(templates), -1).mean(1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads. Published by rename."""
        scratch = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_tensors({k: v.detach().clone().contiguous() for k, v in self.model.state_dict().items()}, scratch / WEIGHTS_FILE)
        (scratch / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        if self.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):  # open_clip looks for it in the folder itself
            self.tokenizer().save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)


def load(spec: Model, seed: int = 0, where: str = "student") -> Clip:
    """The open_clip model a `Model` setting describes, on the CPU in float32, every weight accounted for.

    Raises UserError naming `where` for an unknown source, a wrong architecture, weights that do not fit (with the keys), or an
    activation (QuickGELU) that is not the one the weights were trained with.
    """
    source = Path(spec.weights)
    if spec.ema and not (source.is_dir() and not (source / CONFIG_FILE).is_file()):
        raise UserError(f"{where}.ema: '{spec.weights}' is no run or checkpoint, which alone hold a moving average; leave ema out")
    if spec.weights.startswith("hf-hub:"):
        return _no_arch(spec, where, _from_open_clip(spec.weights, where))
    if (source / CONFIG_FILE).is_file():
        return _no_arch(spec, where, _from_open_clip(f"local-dir:{source}", where))
    if source.is_dir():
        return _no_arch(spec, where, _from_run(source, spec.ema))
    if "/" in spec.weights and not source.exists():
        raise UserError(f"{where}.weights: '{spec.weights}' does not exist; correct the path, or make it first if it is a run's folder")
    if spec.arch is None:
        raise UserError(f"{where}.arch: weights '{spec.weights}' do not name their architecture; set it, e.g. arch: ViT-B-32")
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
    return _create(name, pretrained=spec.weights, quick_gelu=_wanted_gelu(name, spec.quick_gelu, trained, spec.weights, where))


def skeleton(spec: Model, where: str) -> Clip:
    """The model a `Model` setting describes on the meta device: its shapes, no weights, and nothing downloaded."""
    source = Path(spec.weights)
    folder = next((f for f in (source, source / START_FOLDER) if (f / CONFIG_FILE).is_file()), None)
    if spec.arch is None and folder is None:
        raise UserError(f"{where}: '{spec.weights}' is not here and does not say its architecture; for this table, give {where}.arch=ViT-L-14 or another")
    name, gelu = f"local-dir:{folder}", None
    if spec.arch is not None:
        name = _architecture(spec.arch, where)
        tagged = spec.weights in open_clip.list_pretrained_tags_by_model(name)
        trained = bool(open_clip.get_pretrained_cfg(name, spec.weights).get("quick_gelu", False)) if tagged else None
        gelu = _wanted_gelu(name, spec.quick_gelu, trained, spec.weights, where)
    with torch.device("meta"):
        return _unloaded(name, gelu)


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every weight or raise UserError naming the keys that are missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own if k in state and own[k].shape != state[k].shape],
    }
    told = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for kind, keys in problems.items() if keys]
    if told:
        raise UserError(f"{what} does not fit the architecture: {'; '.join(told)}; check `arch`")
    module.load_state_dict(state, strict=True)


def load_trained(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load what a checkpoint holds of a module: everything but its frozen parameters, as strictly as `load_strictly`."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    load_strictly(module, frozen | weights, what)


def _no_arch(spec: Model, where: str, clip: Clip) -> Clip:
    if spec.arch is not None:
        raise UserError(f"{where}.arch: '{spec.weights}' brings its own architecture; leave arch out")
    if spec.quick_gelu is not None and spec.quick_gelu != bool(clip.config["model_cfg"].get("quick_gelu", False)):
        raise UserError(f"{where}.quick_gelu: {spec.quick_gelu}, but '{spec.weights}' was trained with quick_gelu {not spec.quick_gelu}; leave it out")
    return clip


def _architecture(arch: str, where: str) -> str:
    if not arch.endswith(".json"):
        name = arch.replace("/", "-")
        if name not in open_clip.list_models():
            near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            raise UserError(f"{where}.arch: open_clip has no architecture '{arch}'" + (f"; near: {', '.join(near)}" if near else ""))
        return name
    path = Path(arch)
    try:
        cfg = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}.arch: cannot read model config '{arch}': {error}") from None
    if not isinstance(cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= cfg.keys():
        raise UserError(f"{where}.arch: '{arch}' is no open_clip model config; it needs embed_dim, vision_cfg and text_cfg")
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
    return Clip(model, name, {"model_cfg": {**open_clip.get_model_config(name), "quick_gelu": quick_gelu}, "preprocess_cfg": _preprocess(model)})


def _unloaded(name: str, quick_gelu: bool | None) -> Clip:
    logging.disable(logging.WARNING)  # that its weights are random
    try:
        model = open_clip.create_model(name, load_weights=False, device="meta", **({} if quick_gelu is None else {"quick_gelu": quick_gelu}))
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
        lora.attach(tower.visual, settings.load(run / "config.yaml").student.lora, tower.views)
        load_trained(tower, weights, f"checkpoint '{checkpoint}'")
        lora.merge(tower.visual)
    else:
        load_strictly(tower, weights, f"checkpoint '{checkpoint}'")
    return clip


def _from_file(path: Path, name: str, spec: Model, where: str) -> Clip:
    state = _state_dict(path, where)
    if any(k.startswith("visual.") for k in state) and any(not k.startswith("visual.") for k in state):
        if spec.text is not None:
            raise UserError(f"{where}.text: '{path}' already holds a text tower; leave text out")
        if spec.quick_gelu is None and not spec.arch.endswith(".json") and not name.endswith("quickgelu"):
            raise UserError(f"{where}.quick_gelu: the file '{path}' does not say which activation it was trained with; set quick_gelu to true (OpenAI's) or false")
        clip = _create(name, quick_gelu=_wanted_gelu(name, spec.quick_gelu, None, spec.weights, where))
        load_strictly(clip.model, state, f"{where}.weights '{path}'")
        return clip
    if spec.text is None:
        raise UserError(f"{where}.text: '{path}' holds an image tower alone; name the source of its text tower, e.g. text: openai")
    clip = load(spec.model_copy(update={"weights": spec.text, "text": None}), where=f"{where}.text")
    load_strictly(clip.model.visual, {k.removeprefix("visual."): v for k, v in state.items()}, f"{where}.weights '{path}'")
    return clip


def _state_dict(path: Path, where: str) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every loader has its own family of errors for a file that is not its own
        raise UserError(f"{where}.weights: cannot read '{path}' as safetensors or a weights-only torch file: {str(error).splitlines()[0]}") from None
    for wrapper in ("state_dict", "model", "vision_encoder_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}.weights: '{path}' holds no state_dict (names and tensors)")
    return {k.removeprefix("module."): v for k, v in state.items()}


def _preprocess(model: nn.Module) -> dict:
    cfg = dict(open_clip.model.get_model_preprocess_cfg(model))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()}
