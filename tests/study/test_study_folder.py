"""A study's folder: nothing of the user's own is replaced or followed, and damage in it is told or left out."""

import json
import math
import os

import pytest
import yaml
from tiny_study import tree, write

from mmtard.errors import UserError
from mmtard.study import loading, run
from mmtard.study.collect import cost
from mmtard.study.worker import stored_note, stored_seconds


@pytest.fixture
def study(tmp_path, vit):
    return loading.validate(tree(tmp_path / "out", vit))


def test_a_folder_of_the_users_own_is_refused_and_kept(study, tmp_path):
    out = tmp_path / "out"
    for name, content in (
        ("study.yaml", "# mine\n" + loading.dump(study)),
        ("study.yaml", "title: 'a study'\n"),
        ("logs/mine.log", "mine"),
        ("stored/a.json", "mine"),
    ):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        for step in (run.dry_run, run.prepare_folder):
            with pytest.raises(UserError, match="out: '.*(move what is yours out of it|name another folder)"):
                step(study)
        assert path.read_text() == content
        path.unlink()
        if path.parent != out:
            path.parent.rmdir()


def test_a_study_may_be_started_from_the_file_in_its_own_folder(study):
    run.prepare_folder(study)
    file = os.path.join(study.out, "study.yaml")
    run.prepare_folder(loading.load(file))
    assert loading.load(file) == study


@pytest.mark.parametrize("name", ["study.yaml", "logs", "stored", ".study.lock"])
def test_no_link_in_a_study_is_followed(study, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"'.*{name}' is a link, which a study does not follow"):
        run.prepare_folder(study)
    assert victim.read_text() == "precious"


def test_a_pipe_in_a_study_is_not_waited_for(study, tmp_path):
    run.prepare_folder(study)
    (tmp_path / "out/runs/tecoa").mkdir(parents=True)
    os.mkfifo(tmp_path / "out/runs/tecoa/config.yaml")
    with pytest.raises(UserError, match="config.yaml' is a pipe or a device"):
        run.dry_run(study)


@pytest.mark.parametrize("text", ['{"seconds": NaN}', '{"seconds": 1e999}', '{"seconds": -1}', "[" * 10**5, "5", "x"])
def test_a_damaged_note_of_storing_is_no_time(study, text):
    note = stored_note(study, "a")
    note.parent.mkdir(parents=True)
    note.write_text(text)
    assert stored_seconds(study, "a") == 0.0


def test_damaged_metrics_cost_their_own_numbers_alone(tmp_path):
    rows = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": "x"}, {"step": 3, "seconds": math.nan}, {"step": True}]
    rows += [{"step": 4, "seconds": 3.0, "tflops_a_rank": "x", "images_per_s": [1]}, {"step": 5, "seconds": math.inf}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cost(tmp_path, 5, 8)
    assert (found.seconds, found.images, math.isnan(found.gflop)) == (5.0, 40, True)


def test_metrics_that_end_too_early_have_no_whole_time(tmp_path):
    rows = [{"step": step, "seconds": 1.0} for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cost(tmp_path, 10, 8)
    assert math.isnan(found.seconds) and found.by_step[7] == 7.0 and found.images == 80


def test_a_grid_beyond_all_bounds_is_counted_not_laid_out(tmp_path, vit):
    axes = [[{f"attack.{key}": i} for i in range(1, 90)] for key in "abcdef"]
    grid = {"tune": {"train.lr": [i / 1000 for i in range(1, 90)]}, "vary": axes}
    file = write(tmp_path / "s.yaml", tree(tmp_path / "out", vit, grid=grid))
    with pytest.raises(UserError, match="grid: [0-9]{10,} trainings .* more than 20000; list fewer values"):
        loading.load(file)
    assert yaml.safe_load(file.read_text())["grid"] == grid
