"""What a study refuses before it trains or measures anything, and with which words."""

from pathlib import Path

import pytest
from saved_checkpoints import save
from tiny_study import finished, tree, write

from mmtard.cli.main import main
from mmtard.config import dump
from mmtard.data.dataset import open_dataset
from mmtard.errors import UserError
from mmtard.examples.shapes import make_data
from mmtard.files import exclusive
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.study import origin, plan, run as study_run, runs, worker


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
        (
            ["grid.vary=[[{log.wandb.project: a}]]"],
            "grid.vary.0: sets log.wandb.project, which the study sets itself; remove it: it costs time",
        ),
        (["grid.tune.log.tensorboard.every=[1]"], "grid.tune: sets log.tensorboard.every, which the study sets itself"),
        (["grid.vary=[[{probe.data: a}]]"], "grid.vary.0: sets probe.data, which the study sets itself"),
        (["grid.vary=[[{log: {wandb.project: a}}]]"], "grid.vary.0: sets log.wandb.project, which the study sets"),
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
        (["grid.tune.train.steps=[10, 10.0]"], "grid: train.steps=10 and train.steps=10.0 mean the same training"),
        (
            ["methods.again={label: again, settings: {method: {name: tecoa}}}"],
            "methods: tecoa and again have the same settings; leave one out",
        ),
        (
            ["settings.student.weights='{studdy}/a.pt'"],
            "settings.student.weights: '{studdy}/a.pt': {studdy} is not known; write {study} or {source}",
        ),
        (["settings.student.weights='{study}/pretrained/b/c.json'"], "no 'b' in pretrain; there is none"),
        (
            ["methods.teacher.settings.teachers.robust.weights='{study}/models/robsut'"],
            "no 'robsut' in models; there is start, robust",
        ),
        (["grid.vary=[[{attack.stepz: 1}]]"], "methods.tecoa: unknown key 'attack.stepz'; did you mean 'attack.steps'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_before_anything_is_trained(study, overrides, message):
    with pytest.raises(UserError) as refused:
        runs.check(study(*overrides))
    assert message in str(refused.value)


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


@pytest.mark.parametrize("named", ["{study}/models/robust", "HERE/out/models/robust"])
@pytest.mark.parametrize("out", ["out", "./out", "out/", "./out//"])
def test_no_student_learns_from_a_damaged_teacher(study, tmp_path, monkeypatch, out, named):
    """Its newest whole checkpoint would be another teacher than that of the students before."""
    monkeypatch.chdir(tmp_path)
    named = named.replace("HERE", str(tmp_path))
    one = study(f"out={out}", f"methods.teacher.settings.teachers.robust.weights='{named}'")
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
        (
            "models.robust.settings.attack.steps=3",
            "models.robust.settings.attack.steps: is '3', but .* made with nothing",
        ),
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


def test_a_model_that_says_itself_what_the_study_says_for_all_came_of_the_same(study):
    """As after an upgrade of mmtard's own studies."""
    study_run.prepare_folder(study())
    item = plan.tuning_items(study())[0]
    Path(item.config.run_dir).mkdir(parents=True)
    (Path(item.config.run_dir) / "config.yaml").write_text(dump(item.config))
    shared = study().settings["data"]["shards"]
    study_run.prepare_folder(study(f"models.robust.settings.data.shards={shared}"))
    study_run.prepare_folder(study())
    with pytest.raises(UserError, match="^models.robust.settings.data.shards: is 'elsewhere', but .* with '.*/train'"):
        study_run.prepare_folder(study("models.robust.settings.data.shards=elsewhere"))


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


def test_an_unknown_study_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["study", "shaeps"])
    assert "unknown study 'shaeps'; known: " in capsys.readouterr().err


def test_data_that_nothing_makes_are_refused_before_anything_is_written(tmp_path, vit, capsys):
    file = write(tmp_path / "study.yaml", tree(tmp_path / "out", vit))
    for change, line in (
        ("data.maker=shape", "unknown data.maker 'shape'; known: cifar, shapes, shards"),
        ("data.options.trian=5", "unknown key of data.options 'trian'; known: "),
        ("data.source=/nowhere", "data.source: '/nowhere' is no folder; name the one that holds the images"),
        ("pretrain={student: {architecture: big_clip, data: x, steps: 1}}", "'big_clip' is no .json model config"),
        ("pretrain={student: {architecture: tiny_clip, data: x, steps: 10}}", "steps: torch has no cycle of 10 steps"),
    ):
        for how in (["--dry-run"], ["--jobs", "slurm", "--dry-run"], []):
            assert main(["study", str(file), change, *how]) == 2
            assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
