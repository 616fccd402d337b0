"""Where stored teacher embeddings lie, and which of them a configuration names. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import Config, Data, Model
from ..data.paths import default_index, shards_of
from ..errors import UserError

MANIFEST = "manifest.json"


def embeddings_folder(settings: Data) -> Path:
    """Where stored teacher embeddings of this data are: `settings.embeddings`, else embeddings/ beside the index."""
    if settings.embeddings:
        return Path(settings.embeddings)
    index = Path(settings.index) if settings.index else default_index(shards_of(settings))
    return index.parent / "embeddings"


def embedding_recipe(config: Config, teacher: str) -> dict:
    """The settings that a teacher's stored embeddings come from, as a manifest keeps them."""
    data, model = config.data, config.model_of(teacher)
    made = {
        "teacher": _named(model),
        "student": _named(config.student),  # for the size of the images
        "shards": data.shards,
        "index": data.index,
        "resize": data.resize,
        "crop_scale": data.crop_scale,
        "flip": data.flip,
        "views": data.views,
        "seed": config.seed if data.augmented or model.weights == "random" else None,
        "precision": config.engine.precision,
    }
    return json.loads(json.dumps(made))


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a finished store; None where there is none, or it is damaged or another program's.

    It holds `identity` (everything that the embeddings depend on), `samples`, `views` (integers above 0) and `parts`
    (the size in bytes of each file by name).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in ("identity", "parts")):
        return None
    counts = [manifest.get(key) for key in ("samples", "views")]
    return manifest if all(type(n) is int and n > 0 for n in counts) else None


def manifests(folder: Path) -> dict[Path, dict]:
    """Folder -> manifest of every finished store in a folder of them."""
    found = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []:
        manifest = read_manifest(path.parent)
        if manifest is not None:
            found[path.parent] = manifest
    return found


def stored_teachers(config: Config) -> dict[str, Path | None]:
    """Teacher -> the folder of embeddings that were stored from these same settings, or None.

    Every teacher that is set to be `stored` has an entry.
    Whether weights and shards are still those that the embeddings were made of, only `mmtard cache` and `mmtard
    train` can tell.
    """
    wanted = [name for name, teacher in config.teachers.items() if teacher.stored]
    try:
        found = manifests(embeddings_folder(config.data)) if wanted else {}
    except UserError:  # shards that are not there have no embeddings either
        found = {}
    return {
        name: next(
            (path for path, manifest in found.items() if manifest.get("made_from") == embedding_recipe(config, name)),
            None,
        )
        for name in wanted
    }


def _named(model: Model) -> dict:
    """What names a model's weights: the setting, and for a run's folder the checkpoint it stands for."""
    named = model.model_dump(mode="json", include=set(Model.model_fields))
    latest = Path(model.weights) / "checkpoints" / "latest"
    return named | ({"checkpoint": latest.resolve().name} if latest.exists() else {})
