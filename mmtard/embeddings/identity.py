"""Which stored embeddings a configuration may train on: found by the teacher's weights, the images and the data."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import Config
from ..distillation import attack_objectives
from ..distillation.added_terms import run_passes
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..models import loading
from ..models.clip import Clip
from .settings import embeddings_folder
from .store import FORMAT, EmbeddingStore, find_store


def cacheable_teachers(config: Config) -> list[str]:
    """The teachers set to be `stored`, or where none is, every teacher that sees clean images alone.

    Raises UserError for a teacher that is set so and sees adversarial images, which are new at each step.
    """
    attacked = {p.model for p in run_passes(config) if p.image != "clean"}
    if config.attack_objective:
        attacked.add(attack_objectives.find_objective(config.attack_objective, config.fusion).through_teacher)
    clean = config.ensemble.keys() - attacked - config.token_models
    for name, teacher in config.teachers.items():
        if teacher.stored and name not in clean:
            what = (
                "reads this teacher's patch tokens, which are not stored"
                if name in config.token_models
                else "shows this teacher adversarial images, new at each step"
            )
            raise UserError(
                f"teachers.{name}.stored: method '{config.method.name}' with attack objective"
                f" '{config.attack_objective}' {what}; set it to false"
            )
    return [name for name, teacher in config.teachers.items() if teacher.stored] or sorted(clean)


def load_teacher_clip(config: Config, teacher: str, ranks: Ranks) -> Clip:
    """A teacher before any run of the configuration: the untouched student need not be in the run's folder yet.

    Collective.
    """
    spec = config.model_of(teacher)
    where = "student" if spec is config.student else f"teachers.{teacher}"
    return loading.load_clip_on_all_ranks(spec, ranks, config.seed, where)


def embedding_identity(config: Config, clip: Clip, image_size: int | tuple[int, int], fingerprint: str) -> dict:
    """Everything a teacher's embeddings depend on: its image tower, how images are prepared, and the data.

    image_size: of the student, whose images the teacher sees; H = W, or (H, W).
    """
    data, model, preprocess = config.data, clip.config["model_cfg"], clip.config["preprocess_cfg"]
    depends_on = {
        "format": FORMAT,
        "teacher.sha256": clip.sha256(image=True),
        "teacher.vision_cfg": model["vision_cfg"],
        "teacher.quick_gelu": bool(model.get("quick_gelu", False)),
        "teacher.mean": list(preprocess["mean"]),
        "teacher.std": list(preprocess["std"]),
        "teacher.precision": config.engine.precision,
        "data.fingerprint": fingerprint,
        "images.size": image_size,
        "images.resize": None if data.crop_scale else data.resize or image_size,
        "images.interpolation": "bicubic",
        "images.crop_scale": list(data.crop_scale) if data.crop_scale else None,
        "images.flip": data.flip,
        "images.views": data.views,
        "images.seed": config.seed if data.augmented else None,
    }
    return json.loads(json.dumps(depends_on))  # as a manifest gives it back


def open_stores(
    config: Config, clips: dict[str, Clip], image_size: int | tuple[int, int], fingerprint: str, ranks: Ranks
) -> dict[str, EmbeddingStore]:
    """Teacher -> its stored embeddings, for each teacher that is set to be `stored`. Collective.

    Raises UserError on every rank when a teacher cannot be stored, or nothing that is stored matches, naming what
    differs.
    """
    wanted = [name for name, teacher in config.teachers.items() if teacher.stored]
    if not wanted:
        return {}

    def matching() -> dict[str, Path]:
        cacheable_teachers(config)
        folder = embeddings_folder(config.data)
        paths = {
            n: find_store(folder, embedding_identity(config, clips[n], image_size, fingerprint), f"teachers.{n}.stored")
            for n in wanted
        }
        for path in paths.values():
            EmbeddingStore(path)  # raises here, on the first rank, so that every rank ends with the same message
        return paths

    return {name: EmbeddingStore(path) for name, path in ranks.run_on_first(matching).items()}
