"""The run's schema: YAML files plus `key.sub=value` overrides, validated without importing torch.

Every setting appears here once, with its default. `load` answers bad input with one `UserError` that names the key,
the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

import yaml
from braceexpand import UnbalancedBracesError, braceexpand
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from .errors import UserError


def parse_fraction(value: Any) -> Fraction:
    """`2/255`, `0.0078` or a number as an exact Fraction; ValueError with the remedy otherwise."""
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"'{value}' is not a fraction; write it as 2/255 or 0.0078") from None


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"'{value}' is not a number")
    return value


def show_pixels(value: Fraction) -> str:
    """A radius or step as the field writes it: over 255 where that is exact (3/255, not 1/85)."""
    return f"{value * 255}/255" if value.denominator != 1 and (value * 255).denominator == 1 else str(value)


Pixels = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(show_pixels, return_type=str)]
Ratio = Annotated[Fraction, BeforeValidator(parse_fraction), PlainSerializer(str, return_type=str)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# ---------------------------------------------------------------- models


class Model(Section):
    """A CLIP whose image tower is used."""

    arch: str | None = Field(None, description="open_clip architecture, or a .json model config; null when `weights` brings it")
    weights: str = Field(
        ...,
        description="`random`, an open_clip tag, `hf-hub:org/name`, an exported folder, a run or checkpoint folder, "
        "an open_clip checkpoint file, or an image-tower state_dict file",
    )
    text: str | None = Field(None, description="weights of the text tower and logit scale, when `weights` holds an image tower alone")
    quick_gelu: bool | None = Field(None, description="the activation the weights were trained with; null: as their source says")


class Teacher(Model):
    placement: Literal["replicated", "sharded"] = "replicated"


# ---------------------------------------------------------------- method and attack


class MethodSettings(Section):
    """Settings of one objective; `mmtard/methods/<name>.py` holds its mathematics."""

    teachers: ClassVar[tuple[str, ...]] = ()
    attack: ClassVar[str | None] = None  # the objective its attack maximises, unless attack.objective says otherwise


class Clean(MethodSettings):
    name: Literal["clean"]


class TeCoA(MethodSettings):
    attack: ClassVar[str | None] = "ce"
    name: Literal["tecoa"]


class ARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    attack: ClassVar[str | None] = "ce"
    name: Literal["ard"]
    alpha: Number = Field(1.0, ge=0, le=1, description="weight of the distillation term against cross-entropy")
    temperature: Number = Field(30.0, gt=0)
    teacher_view: Literal["clean", "adv"] = Field("clean", description="the image the teacher sees")


class MMTARD(MethodSettings):
    teachers: ClassVar[tuple[str, ...]] = ("clean", "robust")
    attack: ClassVar[str | None] = "kl_clean"
    name: Literal["mmtard"]
    weighting: Literal["official", "confidence_sigmoid"] = "official"
    robust_weight: Number = Field(50.0, ge=0, description="official: factor of the robust teacher's cosine")
    clean_weight: Number = Field(5.0, ge=0, description="official: factor of the clean teacher's cosine")
    slope: Number = Field(4.0, description="confidence_sigmoid: k of sigmoid(k * (p_Tr - p_Tc) + b)")
    bias: Number = Field(0.0, description="confidence_sigmoid: b")
    budget: Number = Field(1.0, gt=0, description="confidence_sigmoid: what the two weights of a sample add up to")


Method = Annotated[Union[Clean, TeCoA, ARD, MMTARD], Field(discriminator="name")]
METHODS: dict[str, type[MethodSettings]] = {
    get_args(m.model_fields["name"].annotation)[0]: m for m in get_args(get_args(Method)[0])
}

# The loss each attack objective maximises, and the teacher it asks for; `mmtard/objectives.py` holds them.
ATTACK_OBJECTIVES: dict[str, str | None] = {
    "ce": None,
    "kl_clean": "clean",
    "kl_robust": "robust",
    "kl_self": None,
}


class Attack(Section):
    algorithm: Literal["pgd", "apgd"] = "pgd"
    objective: str | None = Field(None, description="the loss to maximise; null: the method's own")
    norm: Literal["linf", "l2"] = "linf"
    eps: Pixels = Field(Fraction(2, 255), ge=0)
    step_size: Pixels = Field(Fraction(1, 255), gt=0, description="pgd's step; apgd sets its own")
    steps: Int = Field(10, ge=1)
    momentum: Number = Field(0.0, ge=0, lt=1, description="pgd: momentum of the normalised gradient")
    random_start: bool = True


# ---------------------------------------------------------------- data


class Cache(Section):
    """Node-local staging of remote shards."""

    dir: str | None = Field(None, description="null: $TMPDIR/mmtard-shards")
    max_gb: Number = Field(100.0, gt=0)
    ahead: Int = Field(4, ge=0, description="shards fetched before they are needed, for each rank")


class Data(Section):
    shards: str | list[str] = Field(..., description="a folder, a brace pattern, a tar, pipe:..., or a list of these")
    index: str | None = Field(None, description="index file; null: beside the shards")
    classnames: str | None = Field(None, description="file, one name a line; null: classnames.txt beside the shards")
    templates: str | list[str] = Field(["This is a photo of a {}"], description="prompts with {} or {c}, or a file of them")
    resize: Int | None = Field(None, ge=1, description="shorter side before the crop; null: the crop's size")
    crop_scale: tuple[Number, Number] | None = Field(None, description="random resized crop area; null: centre crop")
    flip: bool = False
    lanes: Int = Field(64, ge=1, description="parallel reading positions; a multiple of every world size to be used")
    window: Int = Field(1024, ge=1, description="samples shuffled together in a lane")
    workers: Int = Field(2, ge=0, description="loader processes a rank")
    max_replaced: Ratio = Field(Fraction(1, 100), ge=0, le=1, description="share of unreadable samples above which the run stops")
    cache: Cache = Cache()


# ---------------------------------------------------------------- training


class Train(Section):
    steps: Int = Field(..., ge=1)
    batch_size: Int = Field(..., ge=1, description="global")
    micro_batch_size: Int | None = Field(None, ge=1, description="most samples a rank takes at once; null: all of its share")
    lr: Number = Field(2e-5, gt=0)
    warmup_steps: Int = Field(0, ge=0)
    weight_decay: Number = Field(1e-4, ge=0)
    betas: tuple[Number, Number] = (0.9, 0.999)
    grad_clip: Number | None = Field(None, gt=0, description="largest global gradient norm; null: no clipping")
    max_bad_steps: Int = Field(10, ge=1, description="non-finite steps in a row after which the run stops")


class Engine(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "float32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2


class Checkpoint(Section):
    every: Int = Field(500, ge=1)
    keep_last: Int = Field(2, ge=1)
    keep_every: Int | None = Field(None, ge=1, description="checkpoints at multiples of this step are kept for good")


class Resume(Section):
    """What a run survives. How each of its starts ended stands in resume.jsonl."""

    allow: list[str] = Field([], description="dotted keys that may differ from the run's stored configuration")
    max_timeouts: Int | None = Field(None, ge=0, description="starts that may end because the job's time is up; null: no bound")
    max_preemptions: Int | None = Field(None, ge=0, description="starts that may end by another signal to the job; null: no bound")
    max_losses: Int | None = Field(5, ge=0, description="starts that may end because a rank was lost or hung; null: no bound")
    max_starts_without_progress: Int = Field(3, ge=1, description="starts in a row from one and the same checkpoint")
    watchdog_minutes: Number = Field(10.0, gt=0, lt=30, description="time of a part of a step (its data, update, checkpoint) after which it counts as hung")


class Log(Section):
    every: Int = Field(10, ge=1, description="steps between console lines; metrics.jsonl has every step")
    tensorboard: bool = True


class Config(Section):
    run_dir: str
    seed: Int = Field(0, ge=0)
    student: Model
    teachers: dict[str, Teacher] = {}
    method: Method
    attack: Attack = Attack()
    data: Data
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    resume: Resume = Resume()
    log: Log = Log()

    @property
    def attack_objective(self) -> str | None:
        """The loss the training attack maximises; None for a method that trains on clean images."""
        return None if self.method.attack is None else self.attack.objective or self.method.attack

    @model_validator(mode="after")
    def _parts_fit(self):
        objective = self.attack.objective
        if objective is not None and objective not in ATTACK_OBJECTIVES:
            raise ValueError(f"attack.objective: unknown objective '{objective}'; known: {', '.join(ATTACK_OBJECTIVES)}")
        needed = set(self.method.teachers)
        if self.attack_objective is not None:
            needed |= {ATTACK_OBJECTIVES[self.attack_objective]} - {None}
        for name in sorted(needed - set(self.teachers)):
            raise ValueError(f"teachers.{name}: method '{self.method.name}' with attack objective '{self.attack_objective}' needs this teacher; add it")
        for name in sorted(set(self.teachers) - needed):
            raise ValueError(f"teachers.{name}: no part of method '{self.method.name}' uses this teacher; remove it (used: {', '.join(sorted(needed)) or 'none'})")
        if self.train.batch_size % self.data.lanes:
            raise ValueError(f"data.lanes: {self.data.lanes} lanes do not divide train.batch_size {self.train.batch_size}; make it a divisor of the batch size")
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps: {self.train.warmup_steps} is more than train.steps {self.train.steps}; lower it")
        return self


# ---------------------------------------------------------------- loading


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The validated configuration of a YAML file (with its `base:` files) and `key.sub=value` overrides.

    Raises UserError for an unreadable file, an unknown key (with the nearest known one), or a value that does not fit.
    """
    tree = _read(Path(path), seen=())
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"override '{text}' is not of the form key.sub=value")
        _set(tree, key.split("."), _scalar(value, text), text)
    return validate(tree)


def validate(tree: dict) -> Config:
    """The configuration of a plain dict; UserError names each bad key."""
    try:
        return Config.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` of this text gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def differences(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted key -> (old, new) where two configurations differ; `resume`, `log` and `run_dir` do not count."""
    a, b = (_flatten(c.model_dump(mode="json")) for c in (old, new))
    keys = (k for k in sorted(a.keys() | b.keys()) if k.split(".")[0] not in ("resume", "log", "run_dir"))
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def check_world(config: Config, world_size: int) -> int:
    """Micro-batches a rank accumulates each step; UserError when lanes or batch do not divide over the ranks."""
    lanes, batch = config.data.lanes, config.train.batch_size
    if lanes % world_size:
        raise UserError(f"data.lanes: {lanes} lanes cannot be shared by {world_size} ranks; make it a multiple of {world_size}")
    share = batch // world_size
    micro = min(config.train.micro_batch_size or share, share)
    if share % micro:
        raise UserError(f"train.micro_batch_size: {micro} does not divide a rank's {share} samples (batch_size {batch} over {world_size} ranks); choose a divisor of {share}")
    return share // micro


def expand_shards(shards: str | list[str]) -> list[str]:
    """Every shard that a `data.shards` value names, sorted within each folder.

    A folder means its `*.tar` files, else those of its `train/`. Raises UserError naming a shard that is missing.
    """
    out = []
    for spec in [shards] if isinstance(shards, str) else shards:
        if is_remote(spec) or not Path(spec).is_dir():
            out += _braces(spec)
        else:
            folder = Path(spec)
            found = sorted(folder.glob("*.tar"), key=_natural) or sorted((folder / "train").glob("*.tar"), key=_natural)
            if not found:
                raise UserError(f"data.shards: no .tar in '{spec}'; write shards with `mmtard shards IMAGES {spec}`")
            out += [str(p) for p in found]
    for path in out:
        if not is_remote(path) and not Path(path).is_file():
            raise UserError(f"data.shards: missing shard '{path}'; correct the pattern or restore the file")
    if not out:
        raise UserError("data.shards: names no shard; give a folder, a pattern or a list")
    return out


def is_remote(shard: str) -> bool:
    """Whether a shard is read through an opener (`pipe:`, `file:`, `https://`, `s3://`) and staged first."""
    return shard.startswith(("pipe:", "file:")) or "://" in shard


def _natural(path: Path):
    return (int(path.stem), "") if path.stem.isdigit() else (-1, path.name)


def _braces(spec: str) -> list[str]:
    try:
        return list(braceexpand(spec))
    except (UnbalancedBracesError, ValueError) as error:
        raise UserError(f"data.shards: '{spec}' is not a brace pattern ({error}); write it like train-{{0000..0099}}.tar") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base:` leads back to itself")
    try:
        tree = _Loader(path.read_text(encoding="utf-8")).get_single_data() or {}
    except OSError as error:
        raise UserError(f"cannot read configuration '{path}': {error.strerror}{_siblings(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


class _Loader(yaml.SafeLoader):
    """The safe loader, which would keep the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _siblings(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1) if path.parent.is_dir() else []
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


def _merge(base: Any, over: Any) -> Any:
    # Another method replaces the base's block whole, whose settings would not fit it; so does null, which empties a block.
    if isinstance(base, dict) and isinstance(over, dict) and base.get("name", over.get("name")) == over.get("name", base.get("name")):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}
    return over


def _scalar(value: str, text: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override '{text}': the value is not valid YAML; quote it") from None


def _set(tree: dict, keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"override '{text}': '{key}' holds a value, not settings")
    tree[keys[-1]] = value


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{name}" if prefix else name).items()}


def _explain(error: dict) -> str:
    loc = [str(p) for p in error["loc"]]
    if loc and loc[0] == "method" and len(loc) > 1 and loc[1] in METHODS:
        del loc[1]  # pydantic names the union's member; the user wrote no such key
    loc = [p for p in loc if p not in ("str", "list[str]")] if loc[:1] == ["data"] else loc
    key, kind = ".".join(loc), error["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], _known_keys(error["loc"][:-1]), n=1)
        where = f" in {'.'.join(loc[:-1])}" if loc[:-1] else ""
        return f"unknown key '{key}'" + (f"; did you mean '{'.'.join([*loc[:-1], near[0]])}'?" if near else f"; known keys{where}: {', '.join(_known_keys(error['loc'][:-1]))}")
    if kind == "missing":
        return f"{key}: this setting is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        return f"method.name: unknown method '{given}'; known: {', '.join(METHODS)}"
    message = error["msg"].removeprefix("Value error, ")
    given = str(error["input"]) if isinstance(error["input"], Fraction) else repr(error["input"])
    if kind == "value_error" and (not key or message.startswith(key)):
        return message
    return f"{key}: {message}" if kind == "value_error" else f"{key}: {given}: {message[0].lower() + message[1:]}"


def _known_keys(loc: tuple) -> list[str]:
    section: Any = Config
    for part in loc:
        if isinstance(section, dict):  # the name of a method or a teacher
            section = section.get(part, Teacher)
        elif part in ("method", "teachers"):
            section = METHODS if part == "method" else {}
        else:
            section = section.model_fields[part].annotation
    return list(section.model_fields)


def world_size_from_env() -> int:
    """Ranks of this launch as torchrun, the deepspeed launcher or srun announce them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or (os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"))

