"""A study's file: what it resolves to, how its settings are chosen, what a dry run lists."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from published_checkpoints import publish
from tiny_study import finished, measure, results, tree, write

from mmtard.cli.main import main
from mmtard.errors import UserError
from mmtard.launch.plan import steps_done
from mmtard.study import choose, loading, measures, plan, runs


def test_every_method_gets_the_same_grid_and_seeds(study, tmp_path):
    one = study()
    runs.check(one)
    assert [(r.method, r.point.number, r.choice.settings["train.lr"], r.seed) for r in runs.tuning_runs(one)] == [
        ("tecoa", 0, 1e-3, 0), ("tecoa", 0, 4e-3, 0), ("teacher", 0, 1e-3, 0), ("teacher", 0, 4e-3, 0),
    ]  # fmt: skip
    assert len(runs.all_runs(one)) == 2 * 2 * 2 * 2  # methods, points, learning rates, seeds
    run = runs.tuning_runs(one)[3]
    config = runs.configuration(one, run)
    assert run.name == "teacher/attack.steps=1/train.lr=0.004/seed-0"
    assert (config.train.lr, config.attack.steps, config.seed, config.method.name) == (4e-3, 1, 0, "rslad")
    assert config.run_dir == str(tmp_path / "out" / "runs" / run.name)
    assert config.teachers["robust"].weights == str(tmp_path / "out" / "models" / "robust")
    assert runs.configuration(one, runs.tuning_runs(one)[0]).train.lr == 1e-3  # no run changes another's settings


def test_two_settings_have_two_folders_though_their_characters_have_no_place_in_a_path(study):
    prompts = ["a photo of a {}", "a photo of a {}!", "a_photo_of_a_", "{}"]
    one = study("grid.tune.train.lr=[2e-3]", f"grid.tune.data.templates={json.dumps(prompts)}")
    named = [choice.name for choice in runs.choices(one)]
    assert named[2] == "train.lr=0.002_data.templates=a_photo_of_a_"  # no character of it changed
    assert all(re.fullmatch(named[2] + "-[0-9a-f]{8}", name) for name in named[:2]) and named[0] != named[1]
    assert named[3] == "train.lr=0.002_data.templates=_"
    assert len(runs.all_runs(one)) == 2 * 2 * 4 * 2  # methods, points, prompts, seeds
    vary = [[{"data.shards": "/d/a b"}, {"data.shards": "/d/a,b"}, {"data.shards": "/d/c"}]]
    first, second, third = (point.name for point in runs.points(study(grid={"tune": {"train.lr": [1]}, "vary": vary})))
    assert first != second and first.startswith("data.shards=_d_a_b-") and third == "data.shards=_d_c"


def test_the_names_of_runs_that_no_other_shares_stay_as_folders_have_them(study):
    axes = "[[{attack.eps_factor: 1}, {attack.eps_factor: 1.4}], [{attack.steps: 3, attack.step_size: 2/255}]]"
    one = study("grid.tune.train.lr=[2e-3]", "grid.tune.train.betas=[[0.9, 0.98]]", f"grid.vary={axes}")
    assert [point.name for point in runs.points(one)] == [
        "attack.eps_factor=1_attack.steps=3_attack.step_size=2_255",
        "attack.eps_factor=1.4_attack.steps=3_attack.step_size=2_255",
    ]
    assert [choice.name for choice in runs.choices(one)] == ["train.lr=0.002_train.betas=_0.9_0.98_"]


@pytest.mark.parametrize("log", ["{log: {every: 5}}", "{log: null}", "{log: {}}"])
def test_no_tracker_runs_where_the_grid_replaces_the_whole_section_that_it_is_in(study, log):
    """It would cost time that counts as a method's."""
    one = study(f"grid.vary=[[{log}]]")
    for run in runs.tuning_runs(one):
        config = runs.configuration(one, run)
        assert not config.log.tensorboard and config.log.wandb is None and config.probe is None


@pytest.mark.parametrize(
    "grid", ["grid.vary=[[{attack: {steps: 1}}, {attack: {steps: 3}}]]", "grid.tune.attack=[{steps: 1}, {steps: 3}]"]
)
def test_a_section_of_the_grid_lies_over_what_the_study_says_of_it(study, grid):
    """What it does not name keeps the study's own values, not the defaults."""
    one = study("grid.vary=[]", grid)
    attacks = [runs.configuration(one, run).attack for run in runs.all_runs(one).values()]
    assert {attack.steps for attack in attacks} == {1, 3}
    assert {(str(attack.eps), str(attack.step_size)) for attack in attacks} == {("8/255", "4/255")}


def test_a_method_that_is_null_is_left_out(study):
    one = study("methods.teacher=null", "evaluations.zeroshot=null")
    assert list(one.methods) == ["tecoa"] and list(one.evaluations) == ["test"]


def test_tuning_at_each_point_is_one_more_choice_a_point(study):
    one = study("grid.tune_each=true")
    assert len(runs.tuning_runs(one)) == 8 and {r.point.number for r in runs.tuning_runs(one)} == {0, 1}


def test_checkpoints_lie_evenly_and_end_with_the_run(study):
    one = study("curve.points=4")
    assert runs.checkpoints(one, 100) == [25, 50, 75, 100]
    assert runs.checkpoints(one, 10) == [2, 4, 6, 8, 10] and runs.checkpoints(one, 3) == [1, 2, 3]
    config = runs.configuration(one, runs.tuning_runs(one)[0])
    assert (config.checkpoint.every, config.checkpoint.keep_every) == (1, 1)
    for steps in ("12", "12.0", "'12'"):
        many = study("curve.points=4", f"settings.train.steps={steps}")
        config = runs.configuration(many, runs.tuning_runs(many)[0])
        assert (config.checkpoint.every, config.checkpoint.keep_every) == (3, 3)


def test_a_teacher_that_is_killed_loses_a_tenth_of_its_training_at_most(study):
    saved = runs.model_configuration(study("models.robust.settings.train.steps=4000"), "robust").checkpoint
    assert (saved.every, saved.keep_every) == (400, None)


def test_a_study_is_the_same_when_it_is_read_from_its_own_copy(study, tmp_path):
    one = study()
    copy = tmp_path / "copy.yaml"
    copy.write_text(loading.dump(one))
    assert loading.load(copy) == one


def test_the_protocol_is_what_the_study_says(study):
    one = study()
    (first, *_) = measures.of_run(one, runs.tuning_runs(one)[0], tuning=True, chosen=False)
    assert first.protocol.eps == (Fraction(8, 255),) and first.protocol.attacks == ("pgd",)
    assert (first.protocol.iters, first.protocol.n_samples) == (2, None)
    assert first.protocol.templates == ("This is a photo of a {}",)  # the student before training has no own
    names = [m.out.name.rpartition("-")[0] for m in measures.of_run(one, runs.tuning_runs(one)[0], True, True)]
    assert names == ["test", "zeroshot", "validation-test", "curve-2", "curve-4"]
    other = study(evaluations={"test": measure("images/test", iters=3)})
    assert measures.of_run(other, runs.tuning_runs(one)[0], False, False)[0].out != first.out


def test_a_methods_moving_average_is_measured_apart_from_its_weights(study):
    plain, averaged = study(), study("methods.tecoa.ema=true", "methods.tecoa.settings.train={ema: 0.9}")
    runs.check(averaged)
    for run in runs.tuning_runs(averaged):
        found = measures.of_run(averaged, run, tuning=True, chosen=True)
        assert all(m.weights.ema == (run.method == "tecoa") for m in found) and len(found) == 5
        same = [m.out for m in found] == [m.out for m in measures.of_run(plain, run, tuning=True, chosen=True)]
        assert same == (run.method != "tecoa")


def test_settings_are_chosen_by_validation_alone_and_an_edge_is_told(study):
    one = study("grid.tune.train.lr=[1e-3, 2e-3, 4e-3]")
    right = {"tecoa": {1e-3: 1, 2e-3: 3, 4e-3: 2}, "teacher": {1e-3: 1, 2e-3: 2, 4e-3: 4}}
    for run in runs.tuning_runs(one):
        n = right[run.method][run.choice.settings["train.lr"]]
        flags = [i < n for i in range(4)]
        for m in measures.of_run(one, run, tuning=True, chosen=False):
            shown = flags if "validation" in m.out.name else [not f for f in flags]  # what tables show says otherwise
            results(m.out, shown, shown)
    tuned = choose.chosen(one)
    assert tuned["tecoa", 0].run.choice.settings == {"train.lr": 2e-3} and tuned["tecoa", 0].at_edge == []
    assert tuned["teacher", 0].run.choice.settings == {"train.lr": 4e-3} and tuned["teacher", 0].at_edge == ["train.lr"]
    assert tuned["teacher", 1].run.choice == tuned["teacher", 0].run.choice
    assert tuned["tecoa", 0].scores == {"lr 0.001": 0.25, "lr 0.002": 0.75, "lr 0.004": 0.5}
    assert choose.best_baseline(one, tuned) == "tecoa"  # teacher scores higher, and is no baseline


def test_a_method_waits_for_its_whole_tuning(study):
    one = study()
    for run in runs.tuning_runs(one)[1:]:
        for m in measures.of_run(one, run, tuning=True, chosen=False):
            results(m.out, [True], [True])
    assert ("tecoa", 0) not in choose.chosen(one) and ("teacher", 0) in choose.chosen(one)


@pytest.mark.parametrize("named", ["{study}/models/robust", "out/models/robust"])
def test_models_are_trained_side_by_side_unless_one_learns_from_another(study, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    robust = {"settings": {"method": {"name": "tecoa"}}}
    taught = {"settings": {"method": {"name": "rslad"}, "teachers": {"robust": {"weights": named}}}}
    one = study(models={"robust": robust, "clean": robust, "taught": taught, "other": robust})
    groups = [[item.words for item in group] for group in plan.model_groups(one)]
    assert groups == [["robust", "clean"], ["taught", "other", "start"]]


def test_a_model_of_a_long_path_with_spaces_is_trained_before_those_that_learn_from_it(study, tmp_path):
    """In a dump of its configuration, such a path is broken over two lines."""
    robust = {"settings": {"method": {"name": "tecoa"}}}
    taught = {"settings": {"method": {"name": "rslad"}, "teachers": {"robust": {"weights": "{study}/models/robust"}}}}
    one = study(f"out={tmp_path / ' '.join(['a folder'] * 20)}", models={"robust": robust, "taught": taught})
    assert [[item.words for item in group] for group in plan.model_groups(one)] == [["robust"], ["taught", "start"]]


def test_a_dry_run_lists_what_is_missing_and_writes_nothing(tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    assert main(["study", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "tecoa, steps 1, lr 0.001, seed 0" in printed and printed.count("to train") >= 5
    assert "6 in all; 5 to train" in printed and "after tuning, up to 6 trainings more" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_made_before_anything_is_trained(tmp_path, vit, capsys):
    how = {"architecture": "tiny_clip", "data": "{study}/data/images", "steps": 4}
    made = {"data": {"maker": "shapes"}, "pretrain": {"student": how}}
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit) | made)
    assert main(["study", str(file), "--dry-run"]) == 0
    assert "made first: data, pretrained/student\n" in capsys.readouterr().out
    assert main(["study", str(file), "--page", "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    (tmp_path / "out" / "data").mkdir(parents=True)
    assert main(["study", str(file), "--dry-run"]) == 0
    assert "made first: pretrained/student\n" in capsys.readouterr().out


def test_a_dry_run_tells_of_no_trainings_after_the_tuning_where_there_are_none(tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    assert main(["study", str(file), "seeds=[0]", "grid.tune_each=true", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "10 in all" in printed and "after tuning" not in printed
    assert main(["study", str(file), "grid.tune_each=true", "--dry-run"]) == 0
    assert "after tuning, up to 4 trainings more" in capsys.readouterr().out


def test_a_run_whose_last_checkpoint_is_damaged_is_not_trained(study):
    item = plan.tuning_items(study())[0]
    publish(Path(item.config.run_dir), 2)
    last = finished(item)
    assert item.trained and not item.damaged
    (last / "weights.safetensors").write_bytes(b"ten")
    assert not item.trained and item.works[0]["work"] == "train"
    assert item.state == (
        "2 of 4 steps; step-4: weights.safetensors has 3 bytes, not 7; its training goes on from step-2"
    )
    (last / "manifest.json").unlink()
    assert item.damaged == "step-4: no manifest.json; its training goes on from step-2"


def test_what_is_measured_of_a_finished_run_is_its_last_step_by_name(study):
    one = study()
    run = runs.tuning_runs(one)[0]
    of_run = [Path(m.weights.weights) for m in measures.of_run(one, run, tuning=True, chosen=True)]
    of_model = [Path(m.weights.weights) for m in measures.of_model(one, "robust")]
    assert [path.name for path in of_run + of_model] == ["step-4"] * 3 + ["step-2", "step-4"] + ["step-4"] * 2
    assert {path.parents[1] for path in of_run} == {runs.run_folder(one, run)}


def test_settings_are_not_chosen_by_runs_that_were_measured_on_other_samples(study):
    one = study()
    for i, run in enumerate(runs.tuning_runs(one)):
        (validation,) = [m for m in measures.of_run(one, run, True, False) if m.out.name.startswith("validation-test-")]
        results(validation.out, [True, False], [True, False], ids=[0, 1 + (i == 2)])
    with pytest.raises(UserError, match="were measured on other samples, so that no difference can be paired"):
        choose.chosen(one)


def test_a_checkpoint_is_known_where_the_file_system_has_no_links(tmp_path):
    publish(tmp_path, 5)
    (publish(tmp_path, 7).parent / "latest").write_text("step-7\n")
    assert steps_done(tmp_path) == 7
