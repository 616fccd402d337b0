"""What the models in a study's folder came of, which is refused where the study now says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from ..config import Data
from ..config.values import shorten
from ..config.yaml_tree import merge, read_tree
from ..data.paths import shards_of
from ..errors import UserError
from ..launch.plan import newest_state
from ..runs.layout import CONFIG
from . import loading, runs
from .plan import Item
from .schema import Study


def check(study: Study) -> None:
    """Raise UserError where the models in the folder came of data, pretraining or teachers that the study changes now.

    What the models of a run were made with is in none of the run's own settings.
    """
    folder = Path(study.out)
    if not has_models(study) or not (folder / loading.FILE).is_file():
        return
    then, now = read_tree(folder / loading.FILE), yaml.safe_load(loading.dump(study))
    then, now = _spelt_out(then, now), _spelt_out(now, then)
    for section in ("data", "pretrain", "models"):
        for key, old, new in _changes(then.get(section), now[section], section):
            if key != "data.source":  # the same images may lie elsewhere; others are told by their digest
                raise UserError(
                    f"{key}: is {_shown(new)}, but what lies in '{folder}' was made with {_shown(old)}; name another "
                    f"folder with --out, or remove its '{runs.RUNS}' and '{runs.MODELS}'"
                )


def has_models(study: Study) -> bool:
    """Whether the study's folder holds runs or teachers, which came of the data and the pretrained models there."""
    return any(next((Path(study.out) / name).rglob(CONFIG), None) for name in (runs.RUNS, runs.MODELS))


def _spelt_out(one: dict, other: dict) -> dict:
    """A study whose models say themselves what the other's models say and its own leave to the study's settings."""
    models, others = one.get("models"), other.get("models")
    if not (isinstance(models, dict) and isinstance(others, dict)):
        return one
    found = dict(models)
    for name, model in models.items():
        if isinstance(model, dict) and isinstance(others.get(name), dict):
            of_all = merge(one.get("settings"), model.get("settings"))
            found[name] = model | {"settings": _with(model.get("settings"), others[name].get("settings"), of_all)}
    return one | {"models": found}


def _with(own: object, other: object, of_all: object) -> object:
    """Settings `own`, with those of `of_all` that `other` names and they do not."""
    if not (isinstance(other, dict) and isinstance(of_all, dict)):
        return of_all if own is None else own
    mine = own if isinstance(own, dict) else {}
    named = {key: _with(mine.get(key), value, of_all.get(key)) for key, value in other.items()}
    return mine | {key: value for key, value in named.items() if value is not None}


def _shown(value: object) -> str:
    return "nothing" if value is None else shorten(value)


def _changes(then: object, now: object, key: str) -> Iterator[tuple[str, object, object]]:
    """(key, old, new) of what differs. One teacher more, or a field that an older version had not, is no difference."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        if then != now:
            yield key, then, now
        return
    is_users = ".settings" in key or ".options" in key
    for name in dict.fromkeys((*then, *now)):
        if is_users or name in then and name in now:
            yield from _changes(then.get(name), now.get(name), f"{key}.{name}")


def check_data(planned: list[Item]) -> None:
    """Raise UserError where a finished run was trained on other data than its shards hold now.

    One that is not finished is refused by the training itself, and data that are gone are needed by no finished one.
    """
    from ..data.dataset import open_dataset

    now: dict[str, str | None] = {}
    for item in planned:
        if item.config is None or not item.trained:
            continue
        data = item.config.data
        key = data.model_dump_json()
        if key not in now:
            now[key] = open_dataset(data).fingerprint if _is_there(data) else None
        then = newest_state(Path(item.config.run_dir)).get("data_fingerprint")
        if None not in (then, now[key]) and then != now[key]:
            raise UserError(
                f"'{item.config.run_dir}' was trained on other data than '{data.shards}' holds now; restore them, "
                "name another folder with --out, or remove that run"
            )


def _is_there(data: Data) -> bool:
    try:
        return bool(shards_of(data))
    except UserError:
        return False
