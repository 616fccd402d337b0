"""What a report is made of: runs with every evaluation of their weights, and models that are no runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import refuse_special
from ..models.clip import START_FOLDER
from ..runs.layout import CHECKPOINTS, RESULTS
from ..runs.manifest import newest
from . import finding
from .pool import Pool, age
from .records import About, Evaluation, read as read_results
from .run_files import ReportSource, is_run_folder, read_run

RESULTS_ALONE = "training: these are evaluation results alone"


def read(paths: list[Path], labels: list[str] | None = None) -> list[ReportSource]:
    """Read the sources in the order given, each with a name of its own.

    paths: run folders, model folders, results.json files or folders of them, folders with any of these below. The
    evaluations of a run or model are found by the hash of its weights wherever they lie below the folders given or
    beside the runs; a folder whose evaluations all went there adds none. What cannot be read below a folder is a source
    with a `problem`. labels: names, one for each path
    or for each source. Raises UserError for a path that is none of these, and where nothing can be read.
    """
    pool = Pool(paths)
    found, of_path = [], []
    for path in paths:
        of_path.append(len(found))
        found += _read(path, pool)
    if found and all(source.problem for source in found):
        raise UserError(f"nothing can be read: {'; '.join(s.problem for s in found[:3])}")
    for i, source in enumerate(found):
        others = [s.name for s in found[:i]]
        if source.name in others:
            source.name = next(name for name in _longer_names(source) if name not in others)
    _label(found, of_path, labels)
    return found


def evaluations_of(folder: Path) -> list[Evaluation]:
    """Read every evaluation that lies in a run or model folder, and those beside it that are of its weights.

    Oldest first; what cannot be read is left out.
    """
    pool = Pool([folder])
    own, _ = pool.take(finding.look_below(folder).results)
    return sorted([*own, *pool.of(finding.Weights(folder))], key=lambda e: age(e.path))


def _label(found: list[ReportSource], of_path: list[int], labels: list[str] | None) -> None:
    if labels is None:
        return
    places = next((places for places in (of_path, range(len(found))) if len(places) == len(labels)), None)
    if places is None:
        names = ", ".join(source.name for source in found)
        raise UserError(f"--labels: {len(labels)} for {len(found)} models ({names}); give one for each of them")
    if len(set(labels)) < len(labels):
        raise UserError("--labels: one stands there twice; give each model a name of its own")
    for place, label in zip(places, labels):
        found[place].name = label
    for i, source in enumerate(found):
        while source.name in (other.name for other in found[:i]):
            source.name += "'"


def _longer_names(source: ReportSource) -> Iterator[str]:
    above = (source.path.parent if source.path.name == RESULTS else source.path).resolve().parts[:-1]
    yield from ("/".join((*above[-n:], source.name)) for n in range(1, len(above) + 1))
    n = 2
    while True:
        yield f"{source.name} ({n})"
        n += 1


def _read(path: Path, pool: Pool) -> list[ReportSource]:
    if not path.exists():
        raise UserError(f"'{path}' does not exist; give a run's folder, or a results.json or its folder")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"'{path}' is neither a file nor a folder; give a run's folder, or a results.json")
    if path.is_file():
        return [ReportSource(_stem(path), path, evaluations=[read_results(path)], missing=[RESULTS_ALONE])]
    if is_run_folder(path):
        return _run(path, pool)
    if finding.is_model_folder(path):
        refuse_special(path)
        evaluations, damaged = pool.take(finding.look_below(path).results)
        evaluations = sorted([*evaluations, *pool.of(finding.Weights(path))], key=lambda e: age(e.path))
        missing = [RESULTS_ALONE, *damaged, *([] if evaluations else [_how_to_evaluate(path)])]
        return [ReportSource(_path_name(path), path, evaluations=evaluations, missing=missing)]
    return _folder(path, pool)


def _folder(path: Path, pool: Pool) -> list[ReportSource]:
    """The runs below a folder with their evaluations, then the models that are no run of these; starts come first."""
    below = pool.below[path]
    sources = [source for run in below.runs for source in _run(run, pool)]
    evaluations, damaged = pool.take(below.results)
    if not below.runs and not evaluations:
        if below.results and not damaged:  # all are of weights that stand before
            return []
        why = f" ({damaged[0].removeprefix('an evaluation: ')})" if damaged else ""
        raise UserError(
            f"'{path}' is neither a run's folder nor holds a {RESULTS}{why}; "
            "run `mmtard evaluate` first, or correct the path"
        )
    by_model = _by_model(evaluations)
    names = _names(path, by_model)
    if len(by_model) == 1 and len(evaluations) == len(below.results):
        names = dict.fromkeys(by_model, path.resolve().name)
    told = [RESULTS_ALONE, *([] if below.runs else damaged)]
    sources += [ReportSource(names[m], path, evaluations=of_one, missing=list(told)) for m, of_one in by_model.items()]
    sources.sort(key=lambda source: not source.name.endswith(f" {START_FOLDER}"))
    problems = [(path, text) for text in damaged] if below.runs else []
    problems += [(folder, f"'{folder}' cannot be listed: {why}") for folder, why in below.unreadable]
    if below.cut:
        problems.append((path, f"'{path}': only the first {finding.MOST_FOLDERS} folders below it were searched"))
    return [*sources, *(ReportSource(where.name, where, problem=text) for where, text in problems)]


def _run(path: Path, pool: Pool) -> list[ReportSource]:
    """A run with the evaluations of its newest weights, and a source for each of its other weights measured."""
    try:
        refuse_special(path)
        run = read_run(path)
    except UserError as error:
        return [ReportSource(path.resolve().name, path, problem=str(error))]
    except OSError as error:
        return [ReportSource(path.resolve().name, path, problem=f"'{path}' cannot be read: {error.strerror or error}")]
    own, damaged = pool.take(finding.look_below(path).results)
    weights = finding.Weights(path)
    run.evaluations = sorted([*own, *pool.of(weights)], key=lambda e: age(e.path))
    run.missing += damaged
    if not run.evaluations:
        run.missing.append(_how_to_evaluate(path))
    return _columns(run, weights)


def _how_to_evaluate(path: Path) -> str:
    return f"accuracy under attack: no evaluation of these weights was found; mmtard evaluate {path} --data ROOT"


def _columns(run: ReportSource, weights: finding.Weights) -> list[ReportSource]:
    """The run with the evaluations of its own weights: those of its last checkpoint, else those last named after it."""
    if not run.evaluations:
        return [run]
    of_newest = [e.model.identity for e in reversed(run.evaluations) if e.model.sha256 == weights.newest]
    last = newest(run.path)[0]  # where weights have no hash, as adapters have none, by their name
    as_the_run = {run.name, f"{run.name} {last.name}"} if last else {run.name}
    named = [e.model.identity for e in reversed(run.evaluations) if _name(e.model, run.path) in as_the_run]
    own = next(iter(of_newest if weights.newest else named), None)
    by_model = _by_model(run.evaluations)
    names = _names(run.path, by_model, {own: run.name})
    run.evaluations = by_model.pop(own, [])
    if by_model and not run.evaluations:
        run.missing.append(
            "accuracy under attack: no evaluation of its newest weights; those of others have columns of their own"
        )
    missing = f"training: these are other weights than the newest of the run '{run.path}'"
    others = [ReportSource(names[m], run.path, evaluations=of_one, missing=[missing]) for m, of_one in by_model.items()]
    return [run, *others]


def _by_model(evaluations: list[Evaluation]) -> dict[tuple, list[Evaluation]]:
    """The evaluations of each model by its identity; in each, and by each one's first, oldest first."""
    found: dict[tuple, list[Evaluation]] = {}
    for evaluation in evaluations:
        found.setdefault(evaluation.model.identity, []).append(evaluation)
    return found


def _names(
    folder: Path, by_model: dict[tuple, list[Evaluation]], given: dict[tuple | None, str] | None = None
) -> dict[tuple | None, str]:
    """A name for each model beside those given: that of its newest evaluation.

    Where a newer model has that name, too, the hash of the weights is added.
    """
    names = dict(given or {})
    for model, of_one in reversed(by_model.items()):
        name = _name(of_one[-1].model, folder)
        names.setdefault(model, name if name not in names.values() else f"{name} {of_one[-1].model.sha256[:8]}")
    return names


def _name(model: About, folder: Path) -> str:
    """`b32`, `b32 most_robust`, `b32 start` or `b32 ema`, as the weights were given; the folder's own for `.`."""
    name = _path_name(Path(model.weights)) or folder.resolve().name
    return f"{name} ema" if model.ema else name


def _path_name(path: Path) -> str:
    if path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name} {path.name}"
    if path.name == START_FOLDER and path.parent.name:
        return f"{path.parent.name} {START_FOLDER}"
    return path.name


def _stem(path: Path) -> str:
    return path.resolve().parent.name if path.name == RESULTS else path.stem
