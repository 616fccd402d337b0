"""A study's file: what it resolves to, what is refused and with which words, what a dry run lists."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from published_checkpoints import publish
from saved_checkpoints import save
from tiny_study import measure, results, tree, write

from mmtard.cli.main import main
from mmtard.config import dump
from mmtard.data.dataset import open_dataset
from mmtard.errors import UserError
from mmtard.examples.shapes import make_data
from mmtard.files import exclusive
from mmtard.launch.plan import steps_done
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.study import choose, cluster, loading, measures, origin, plan, run as study_run, runs, worker


@pytest.fixture
def study(tmp_path, vit):
    """Call with changes: the study that the file resolves to."""
    return lambda *overrides, **changes: loading.load(
        write(tmp_path / "study.yaml", tree(tmp_path / "out", vit, **changes)), overrides
    )


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


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["seed=[1]"], "unknown key 'seed'; did you mean 'seeds'?"),
        (["grid.tunes={}"], "unknown key 'grid.tunes'; did you mean 'grid.tune'?"),
        (
            ["methods.tecoa.bsaeline=true"],
            "unknown key 'methods.tecoa.bsaeline'; did you mean 'methods.tecoa.baseline'",
        ),
        (["evaluations.test.iter=3"], "unknown key 'evaluations.test.iter'; did you mean 'evaluations.test.iters'?"),
        (["curve.measure.epz=1"], "unknown key 'curve.measure.epz'; did you mean 'curve.measure.eps'?"),
        (["grid.tune={seed: [1]}"], "grid.tune: has no train.lr"),
        (["grid.tune.train.lr=[1e-3, 1e-3]"], "list each value once"),
        (["grid.vary=[[{attack.steps: 1}, {attack.steps: 1}]]"], "grid.vary.0: [{'attack.steps': 1}, "),
        (
            ["grid.vary=[[{attack.steps: 1}], [{attack.steps: 2}]]"],
            "grid.vary.1: sets attack.steps, which an earlier",
        ),
        (
            ["grid.tune.seed=[1, 2]"],
            "grid.tune: sets seed, which the study sets itself; remove it: list the seeds of the",
        ),
        (["grid.tune.run_dir=[a, b]"], "grid.tune: sets run_dir, which the study sets itself"),
        (["grid.tune.checkpoint=[{every: 5}, {keep_last: 3}]"], "grid.tune: sets checkpoint.every, which the study"),
        (["grid.vary=[[{checkpoint.every: 5}]]"], "grid.vary.0: sets checkpoint.every, which the study sets itself"),
        (["settings.log.wandb={project: a}"], "settings: sets log.wandb, which the study sets itself; remove it: it"),
        (["methods.tecoa.settings.probe={data: a}"], "methods.tecoa.settings: sets probe, which the study sets itself"),
        (["settings.run_dir=a"], "settings: sets run_dir, which the study sets itself; remove it: each run has a"),
        (["methods.tecoa.settings.seed=3"], "methods.tecoa.settings: sets seed, which the study sets itself"),
        (["settings.seed=3", "models={}"], "settings: sets seed, which the study sets itself"),
        (["models.robust.settings.checkpoint.keep_every=3"], "models.robust.settings: sets checkpoint.keep_every, "),
        (["models.start.settings.method.name=tecoa"], "models.start: so the student before any training is called"),
        (["seeds=[]"], "seeds: "),
        (["seeds=[1, 1]"], "seeds: [1, 1]: name each seed once"),
        (["validation={}"], "validation: several values in grid.tune need data to choose by"),
        (["validation.test.data='{study}/data/images/test'"], "in `evaluations`, too; settings must be chosen on data"),
        (["methods.tecoa.baseline=false"], "methods: none is a baseline; mark those of one teacher or none"),
        (["methods.tecoa.ablates=gone"], "methods.tecoa.ablates: 'gone' is no other method; known: tecoa, teacher"),
        (["curve.against=gone"], "curve.against: 'gone' is no method"),
        (["methods.tecoa.label=teacher"], "two are called 'teacher'"),
        (["evaluations.test.eps=2"], "evaluations.test.eps: 2: "),
        (["title=null"], "title: this setting is required"),
        (["methods={'a/b': {baseline: true}}"], "is no name; write letters"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place_and_remedy(study, overrides, message):
    with pytest.raises(UserError) as refused:
        study(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["methods.tecoa.settings.train={lr: 1}"],
            "methods.tecoa.settings: sets train.lr, which the grid sets for every",
        ),
        (["methods.tecoa.settings.train={steps: 8}"], "compare methods at one budget"),
        (
            ["methods.tecoa.ema=true"],
            "methods.tecoa.ema: its runs keep no moving average of weights; set methods.tecoa.",
        ),
        (["methods.tecoa.settings.method.name=tecao"], "methods.tecoa: method.name: unknown method 'tecao'"),
        (["models.robust.settings.train.steps=0"], "models.robust: train.steps: "),
        (
            ["grid.tune.attack.eps=[6/255, 12/510]"],
            "grid: attack.eps=6/255 and attack.eps=12/510 mean the same training; list it once",
        ),
        (["grid.vary=[[{}, {attack.eps: 8/255}]]"], "grid: no setting and attack.eps=8/255 mean the same training"),
        (
            ["grid.vary=[[{data.lanes: 16}, {data.lanes: '16'}]]"],
            "grid.vary: {'data.lanes': 16} and {'data.lanes': '16'} would both be kept as 'data.lanes=16'; write",
        ),
        (["grid.vary=[[{attack.stepz: 1}]]"], "methods.tecoa: unknown key 'attack.stepz'; did you mean 'attack.steps'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_before_anything_is_trained(study, overrides, message):
    with pytest.raises(UserError) as refused:
        runs.check(study(*overrides))
    assert message in str(refused.value)


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


def test_models_are_trained_side_by_side_unless_one_learns_from_another(study):
    robust = {"settings": {"method": {"name": "tecoa"}}}
    taught = {"settings": {"method": {"name": "rslad"}, "teachers": {"robust": {"weights": "{study}/models/robust"}}}}
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


def test_a_run_that_was_made_with_other_settings_is_named(study, tmp_path):
    one = study()
    item = plan.tuning_items(one)[0]
    folder = tmp_path / "out" / "runs" / runs.tuning_runs(one)[0].name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(item.config))
    item.check_settings()
    other = plan.tuning_items(study("settings.train.steps=5"))[0]
    with pytest.raises(UserError, match="was made with train.steps 4, and the study now says 5; name another folder"):
        other.check_settings()


def test_a_dry_run_tells_of_no_trainings_after_the_tuning_where_there_are_none(tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    assert main(["study", str(file), "seeds=[0]", "grid.tune_each=true", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "10 in all" in printed and "after tuning" not in printed
    assert main(["study", str(file), "grid.tune_each=true", "--dry-run"]) == 0
    assert "after tuning, up to 4 trainings more" in capsys.readouterr().out


def finished(item, **state):
    """The folder of a run whose last checkpoint is there."""
    return publish(Path(item.config.run_dir), item.config.train.steps, **state)


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


def test_a_damaged_checkpoint_is_not_measured_and_its_remedy_is_told(tmp_path):
    saver = Checkpoints(tmp_path, keep_last=3)
    save(saver, 1, 2)
    last = tmp_path / "checkpoints" / "step-2"
    worker.refuse_damaged(last)
    weights = bytearray((last / "weights.safetensors").read_bytes())
    weights[-1] ^= 1  # its size is as before
    (last / "weights.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="step-2' is damaged .*does not match its checksum.*; remove that folder, and"):
        worker.refuse_damaged(last)
    way = tmp_path / "checkpoints" / "step-1"
    (way / "state.json").unlink()
    with pytest.raises(UserError, match=f"step-1' is damaged .*; remove '{tmp_path}', and the study trains and meas"):
        worker.refuse_damaged(way)


def test_no_student_learns_from_a_damaged_teacher(study):
    """Its newest whole checkpoint would be another teacher than that of the students before."""
    one = study()
    folder = runs.model_folder(one, "robust")
    folder.mkdir(parents=True)
    save(Checkpoints(folder, keep_last=3), 2, 4)
    weights = folder / "checkpoints" / "step-4" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    name = next(run.name for run in runs.all_runs(one).values() if run.method == "teacher")
    status, message = worker.carry_out(one, {"work": worker.TRAIN, "name": name}, None)
    assert status == 2 and "step-4' is damaged" in message and message.endswith("from the checkpoint before")


def test_a_finished_run_of_other_data_is_named(study, tmp_path):
    """The options of the study's data changed, so that they were made anew, and all its runs are done."""
    item = plan.tuning_items(study())[0]
    images = tmp_path / "out" / "data" / "images"
    make_data(images, train=4, test=0, zeroshot=0)
    finished(item, data_fingerprint=open_dataset(item.config.data).fingerprint)
    origin.check_data([item])
    images.rename(tmp_path / "away")
    origin.check_data([item])  # a page of finished runs needs no data
    make_data(images, train=4, test=0, zeroshot=0, seed=1)
    with pytest.raises(UserError, match="was trained on other data than '.*' holds now; restore them, name another"):
        origin.check_data([item])


@pytest.mark.parametrize(
    "change, line",
    [
        (
            "models.robust.settings.train.lr=2e-3",
            "models.robust.settings.train.lr: is '2e-3', but .* made with '0.001'",
        ),
        ("models.robust.settings.attack.steps=3", "models.robust.settings.attack: is .*, but .* made with nothing"),
        (
            "data.options.test=40",
            "data.options.test: is '40', but what lies in '.*out' was made with '36'; name another",
        ),
    ],
)
def test_what_the_models_of_a_folder_came_of_is_not_changed_under_them(study, change, line):
    study_run.prepare_folder(study())
    study_run.prepare_folder(study(change))  # nothing is trained yet
    study_run.prepare_folder(study())
    item = plan.tuning_items(study())[0]
    Path(item.config.run_dir).mkdir(parents=True)
    (Path(item.config.run_dir) / "config.yaml").write_text(dump(item.config))
    for step in (study_run.prepare_folder, study_run.dry_run):
        with pytest.raises(UserError, match=f"^{line}"):
            step(study(change))
    study_run.prepare_folder(study("models.another.settings.method.name=tecoa", "data.source=elsewhere"))


@pytest.mark.parametrize(
    "change, line",
    [
        ("evaluations.test.attacks=[pgd, foo]", "evaluations.test: unknown attack 'foo'"),
        ("methods.teecher.label=x", "methods.teecher: has no settings.method, .*, or did you mean 'teacher'?"),
        ("evaluations.test.n_samples=-5", "evaluations.test.n_samples: '-5': input should be greater"),
        ("curve.measure.protocol=quikc", "curve.measure: unknown protocol 'quikc'; known: .*quick"),
        ("validation.test.data='{study}/data/images/test/'", "validation.test.data: '.*' is in `evaluations`, too"),
        ("grid.vary=[[{train.lr: 1e-3}]]", "grid.vary.0: sets train.lr, which grid.tune chooses; leave it to one"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_before_anything_is_trained(study, change, line):
    with pytest.raises(UserError, match=f"^{line}"):
        study_run.dry_run(study(change))


def test_data_of_a_measurement_that_are_missing_are_named_before_anything_is_trained(study, tmp_path):
    with pytest.raises(UserError, match="^evaluations.test: data.shards: missing shard '/nonexistent'; no such folder"):
        study_run.run_here(
            study(
                "curve.measure.data=/nonexistent",
                "evaluations.test.data=/nonexistent",
                "evaluations.zeroshot.data=/nonexistent",
            ),
            lambda _: None,
            "mmtard study",
        )
    assert not list((tmp_path / "out").rglob("config.yaml"))


def test_settings_are_not_chosen_by_runs_that_were_measured_on_other_samples(study):
    one = study()
    for i, run in enumerate(runs.tuning_runs(one)):
        (validation,) = [m for m in measures.of_run(one, run, True, False) if m.out.name.startswith("validation-test-")]
        results(validation.out, [True, False], [True, False], ids=[0, 1 + (i == 2)])
    with pytest.raises(UserError, match="were measured on other samples, so that no difference can be paired"):
        choose.chosen(one)


def test_a_study_that_is_refused_leaves_what_its_workers_and_jobs_read(study, tmp_path):
    one = study()
    study_run.prepare_folder(one)
    written = (tmp_path / "out" / "study.yaml").read_text()
    with (
        exclusive(tmp_path / "out" / study_run.LOCK),
        pytest.raises(UserError, match="another process works on this study"),
    ):
        study_run.run_here(study("settings.train.steps=5"), lambda _: None, "mmtard study")
    item = plan.tuning_items(one)[0]
    Path(item.config.run_dir).mkdir(parents=True)
    (Path(item.config.run_dir) / "config.yaml").write_text(dump(item.config))
    with pytest.raises(UserError, match="was made with train.steps 4, and the study now says 5"):
        study_run.run_here(study("settings.train.steps=5"), lambda _: None, "mmtard study")
    assert (tmp_path / "out" / "study.yaml").read_text() == written


def test_a_checkpoint_is_known_where_the_file_system_has_no_links(tmp_path):
    publish(tmp_path, 5)
    (publish(tmp_path, 7).parent / "latest").write_text("step-7\n")
    assert steps_done(tmp_path) == 7


def test_an_unknown_study_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["study", "shaeps"])
    assert "unknown study 'shaeps'; known: " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--nodes", "2"], ["--no-exclusive"], ["--partition", "gpu"]])
def test_flags_of_jobs_are_refused_where_no_job_is_submitted(flags, tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    assert main(["study", str(file), *flags, "--dry-run"]) == 2
    name = flags[0].replace("--no-", "--")
    assert f"{name}: says what a job asks Slurm for; add --jobs slurm, or leave {name} out" in capsys.readouterr().err


def test_a_study_on_slurm_submits_what_can_be_known_now(tmp_path, vit, capsys):
    """The teacher, then the tuning after it; the seeds are named as a second step. Nothing is written."""
    (tmp_path / "out" / "data" / "images" / "train").mkdir(parents=True)
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    words = ["--jobs", "slurm", "--dry-run", "--gpus-per-node", "1", "--partition", "gpu", "--time", "1:00:00"]
    assert main(["study", str(file), *words]) == 0
    printed = capsys.readouterr().out
    stages = [line for line in printed.splitlines() if line.startswith("# ====")]
    assert [s.split(": sbatch")[0].removeprefix("# ==== ") for s in stages] == [
        "model robust: training", "model robust: measuring", "model start: measuring", "tuning: training",
        "tuning: measuring",
    ]  # fmt: skip
    assert "--partition=gpu" in printed and "--array=0-3" in printed and "afterok:JOB_OF_mmtard-robust" in printed
    assert "study " in printed and "--measure tuning:tecoa/attack.steps=1/train.lr=0.001/seed-0" in printed
    assert "the same command submits the seeds at the settings that were chosen" in printed
    assert not (tmp_path / "out" / "study.yaml").exists()


def test_on_slurm_models_wait_for_those_that_they_learn_from_alone(study):
    robust = {"settings": {"method": {"name": "tecoa"}}}
    taught = {"settings": {"method": {"name": "rslad"}, "teachers": {"robust": {"weights": "{study}/models/robust"}}}}
    one = study(models={"robust": robust, "clean": robust, "taught": taught})
    after = {stage.title: [run.name for run in stage.after] for stage in cluster.plan(one, 1).stages}
    assert after["model robust: training"] == after["model clean: training"] == []
    assert after["model taught: training"] == ["robust", "clean"]
    assert after["tuning: training"] == ["robust", "clean", "taught"]


def test_a_dry_run_refuses_data_that_nothing_makes(tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    for change, line in (
        ("data.maker=shape", "unknown data.maker 'shape'; known: cifar, shapes"),
        ("data.options.trian=5", "unknown key of data.options 'trian'; known: "),
        ("data.source=/nowhere", "data.source: '/nowhere' is no folder; name the one that holds the images"),
        ("pretrain={student: {architecture: big_clip, data: x, steps: 1}}", "'big_clip' is no .json model config"),
        ("pretrain={student: {architecture: tiny_clip, data: x, steps: 10}}", "steps: torch has no cycle of 10 steps"),
    ):
        assert main(["study", str(file), change, "--dry-run"]) == 2
        assert line in capsys.readouterr().err
