"""What is said of a model whose source cannot be: by `mmtard config`, which loads nothing, and by the loading."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from ..errors import UserError


def no_architecture(key: str, weights: str) -> UserError:
    """Weights that do not say their architecture. key: the setting that would, such as `student.arch`."""
    return UserError(f"{key}: weights '{weights}' do not name their architecture; set it, e.g. arch: ViT-B-32")


def unknown_architecture(key: str, arch: str, known: Collection[str]) -> UserError:
    """A name that open_clip does not have; says which ones are near."""
    near = difflib.get_close_matches(arch.replace("/", "-"), known, n=3)
    hint = f"near: {', '.join(near)}" if near else "open_clip.list_models() has them all"
    return UserError(f"{key}: open_clip has no architecture '{arch}'; {hint}")


def absent_weights(where: str, weights: str) -> UserError:
    """A path at which nothing is."""
    return UserError(
        f"{where}.weights: '{weights}' does not exist; correct the path, or make it first if it is a run's folder"
    )


def unknown_weights(where: str, weights: str, arch: str | None, tags: Collection[str]) -> UserError:
    """A word that is no tag of the architecture, nor anything else that weights can be named by."""
    return UserError(
        f"{where}.weights: '{weights}' is neither a file, a folder, hf-hub:..., 'random' nor a tag of {arch}"
        f" (tags: {', '.join(tags) or 'none'})"
    )
