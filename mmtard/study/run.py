"""A study from beginning to end: materials, teachers, tuning, seeds, page. What is done is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..distributed.interruption import Interruption
from ..errors import UserError
from ..files import exclusive, held, refuse_special, why_not_written, write_text
from . import loading, measures, origin, runs
from .choose import Tuned, chosen
from .here import LOGS, Crew
from .plan import Item, model_groups, model_items, seed_items, show, tuning_items
from .schema import Study
from .worker import STORED

LOCK = ".study.lock"
Maker = Callable[[Study], None]  # makes the data and the pretrained models of a study, what is there excepted


def items(study: Study) -> list[Item]:
    """All that is to be trained and measured, as far as settings are chosen."""
    return _items(study, chosen(study))


def _items(study: Study, tuned: dict[tuple[str, int], Tuned]) -> list[Item]:
    won = {key: one.run for key, one in tuned.items()}
    return [*model_items(study), *tuning_items(study), *seed_items(study, won)]


def dry_run(study: Study) -> None:
    """Print what is done and what is missing; nothing is written."""
    runs.check(study)
    measures.check(study, data=False)
    check_folder(study)
    origin.check(study)
    tuned = chosen(study)
    planned = _items(study, tuned)
    for item in planned:
        item.check_settings()
    materials = [*(["data"] if study.data else []), *(f"pretrained/{name}" for name in study.pretrain)]
    if missing := [part for part in materials if not (Path(study.out) / part).is_dir()]:
        print(f"made first: {', '.join(missing)}")
    show(study, planned)
    waiting = [name for name in study.methods if (name, 0) not in tuned]
    points = [len(runs.points_of(study, method)) for method in waiting]
    by_tuning = points if study.grid.tune_each else [1] * len(points)  # with the first seed, by the tuning itself
    if more := len(study.seeds) * sum(points) - sum(by_tuning):
        print(f"after tuning, up to {more} trainings more: the other seeds and settings of {', '.join(waiting)}")


def run_here(study: Study, make: Maker, command: str) -> Path:
    """Do on this machine what is missing, and write the page; its path.

    Raises UserError for what the user can mend, before anything is trained where it can be seen then; RunError where a
    run fails, or with status EXIT_REQUEUE where this process was asked to stop: the same call goes on.
    """
    from . import findings, page  # matplotlib: not before it is needed

    runs.check(study)
    measures.check(study, data=False)
    page.check_folder(study)
    check_folder(study)
    refuse_at_work(study)
    folder = _made(Path(study.out))
    with _alone(folder):
        prepare_folder(study)
        make(study)  # a signal ends it at once: what is half made is not there
        measures.check(study, data=True)
        origin.check_data(items(study))
        with Interruption() as interruption, Crew(study, folder, interruption) as crew:
            for group in model_groups(study):
                crew.do(_checked(group))
            crew.do(_checked(tuning_items(study)))
            crew.do(_checked(seed_items(study, {key: tuned.run for key, tuned in chosen(study).items()})))
        return page.write(findings.collect(study), command)


def check_folder(study: Study) -> None:
    """Raise UserError where the study would replace or follow what no study made: a file of the user's own, a link."""
    folder = Path(study.out)
    remedy = "move what is yours out of it, or name another folder with --out"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: '{folder}' exists and is not a folder; name another one with --out")
    file = folder / loading.FILE
    links = [name for name in (loading.FILE, LOGS, STORED, LOCK) if (folder / name).is_symlink()]
    if links:
        raise UserError(f"out: '{folder / links[0]}' is a link, which a study does not follow; {remedy}")
    if os.path.lexists(file) and not loading.is_own(file):
        raise UserError(f"out: '{file}' is not as mmtard wrote it, and would be replaced; {remedy}")
    if not file.exists():
        foreign = [name for name in (LOGS, STORED) if os.path.lexists(folder / name)]
        if foreign:
            raise UserError(f"out: '{folder}' is no study's folder, and holds '{foreign[0]}'; {remedy}")
    if os.path.lexists(folder / LOCK) and not (folder / LOCK).is_file():
        raise UserError(f"out: '{folder / LOCK}' is no file; remove it")
    for name in (runs.RUNS, runs.MODELS, STORED, LOGS):
        refuse_special(folder / name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the study's lock. UserError where the folder takes no file."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder / LOCK))
        except OSError as error:
            raise _not_written(folder, error) from None
        yield


def refuse_at_work(study: Study) -> None:
    """Raise UserError where a process on this machine works on the study: its workers read what is written here."""
    if held(Path(study.out) / LOCK):
        raise UserError(f"'{study.out}': another process works on this study; wait for it, or name another --out")


def prepare_folder(study: Study) -> None:
    """Make the study's folder, and write into it the study as it is run.

    Raises UserError where that cannot be, and where a run there was made with other settings: workers and queued jobs
    read the study that is written there.
    """
    check_folder(study)
    origin.check(study)
    for item in items(study):
        item.check_settings()
    folder = _made(Path(study.out))
    try:
        write_text(folder / loading.FILE, loading.dump(study))
        with suppress(FileExistsError):
            os.mkdir(folder / runs.RUNS)
    except OSError as error:
        raise _not_written(folder, error) from None


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from None
    return folder


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"out: {why_not_written(folder, error)}; name another folder with --out")


def write_page(study: Study, command: str) -> Path:
    """Write the page of what is there, complete or not; its path."""
    from . import findings, page

    page.check_folder(study)
    check_folder(study)
    found = findings.collect(study)
    if not found.states:
        raise UserError(f"'{study.out}' has no measured run yet; start the study without --page")
    return page.write(found, command)


def _checked(planned: list[Item]) -> list[Item]:
    for item in planned:
        item.check_settings()
        if item.damaged:
            print(f"WARN {item.config.run_dir}: {item.damaged}")
    return planned
