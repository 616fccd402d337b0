"""A study on Slurm: what is missing of its next parts as jobs, through the machinery of `mmtard submit`."""

from __future__ import annotations

from pathlib import Path

from ..config import check_world
from ..data.paths import shards_of
from ..launch.plan import Plan, Stage, Work, storing_works
from ..launch.request import JobRequest
from ..launch.snapshot import Snapshot
from ..launch.submit import show_plan, submit_plan
from . import loading, measures, runs
from .choose import chosen
from .plan import Item, model_groups, seed_items, tuning_items
from .run import Maker, prepare_folder, refuse_at_work
from .schema import Study


def submit(study: Study, make: Maker, request: JobRequest, dry: bool) -> int:
    """Submit what can be known now; 0 when it is submitted, or nothing is left.

    Settings are chosen when the tuning is measured, so a study that tunes is submitted twice: the same command again
    submits the other seeds and settings, and in the end writes the page.
    """
    runs.check(study)
    measures.check(study, data=False)
    todo = plan(study, request.world)
    for note in todo.notes:
        print(f"# {note}")
    if not todo.stages:
        return 0
    snapshot = Snapshot(todo.folder)
    if dry:
        return show_plan(todo, request, snapshot)
    from ..launch.job import check_slurm  # submitit

    check_slurm("without --jobs slurm it is run on this machine")
    snapshot.refuse_patterns()
    refuse_at_work(study)
    prepare_folder(study)
    make(study)
    measures.check(study, data=True)
    for stage in todo.stages:
        for work in stage.works:
            if work.config:
                shards_of(work.config.data)  # names what is missing, before anything waits in the queue for it
    return submit_plan(todo, request, snapshot, False)


def plan(study: Study, world: int) -> Plan:
    """The stages that can be submitted now: each model, then all tuning runs, or all seeds; then their measurements."""
    stages: list[Stage] = []
    notes: list[str] = []
    before: tuple[Path, ...] = ()
    for group in model_groups(study):
        stages += [stage for item in group for stage in _stages(study, f"model {item.words}", [item], world, before)]
        before = tuple(work.run_dir for stage in stages for work in stage.works if work.config)
    won = {key: tuned.run for key, tuned in chosen(study).items()}
    waiting = [item for item in tuning_items(study) if not item.done]
    stages += _stages(study, "tuning", waiting, world, before)
    ready = [item for item in seed_items(study, won) if not item.done]
    if waiting:
        notes.append("when these jobs are done, the same command submits the seeds at the settings that were chosen")
        ready = []
    stages += _stages(study, "seeds", ready, world, before)
    if not stages:
        notes.append("every run is trained and measured")
    return Plan(Path(study.out), stages, notes)


def _stages(study: Study, title: str, items: list[Item], world: int, after: tuple[Path, ...]) -> list[Stage]:
    """The trainings that are missing of some items as one array, then what is to be measured as another."""
    training = [item for item in items if not item.trained and item.config]
    for item in training:
        check_world(item.config, world)
        item.check_settings()
    found = []
    if training:
        storing, _ = storing_works([item.config for item in training if item.reads_stored], after)
        if storing:
            found.append(Stage(f"{title}: stored embeddings", tuple(storing), after))
            after = (*after, *(work.run_dir for work in storing))
        works = tuple(Work(Path(item.config.run_dir), item.config, ("train",)) for item in training)
        found.append(Stage(f"{title}: training", works, after))
    measuring = [item for item in items if item.to_measure]
    if measuring:
        file = str((Path(study.out) / loading.FILE).absolute())
        works = tuple(Work(_folder(study, item), None, ("study", file, "--measure", item.key)) for item in measuring)
        found.append(
            Stage(f"{title}: measuring", works, tuple(work.run_dir for work in (found[-1].works if found else ())))
        )
    return found


def _folder(study: Study, item: Item) -> Path:
    return Path(item.config.run_dir) if item.config else Path(study.out) / runs.MODELS / item.words
