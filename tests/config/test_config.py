"""How a configuration is put together: files, bases, overrides; what it says of a run; those that are shipped."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from mmtard import config
from mmtard.errors import UserError


@pytest.mark.parametrize(
    "content, words",
    [
        ("train: [1, 2", "run.yaml is not valid YAML|line 1"),
        ("- a\n- b\n", "expected `key: value` lines, found list"),
        ("", "run_dir: this setting is required; student: this setting is required"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML|python/object"),
        ("base: gone.yaml\n", "cannot read configuration|gone.yaml|No such file"),
        ("base: run.yaml\n", "run.yaml: its `base:` leads back to itself"),
    ],
)
def test_a_file_that_cannot_be_used(write, content, words):
    with pytest.raises(UserError) as error:
        config.load(write(content))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words.split("|")), error.value


def test_a_missing_file_is_answered_with_its_neighbour(tree, write):
    path = write(tree, "vitb32_mmtard.yaml")
    with pytest.raises(
        UserError, match=r"cannot read configuration.*vitb32_mmtrd.yaml.*did you mean '.*vitb32_mmtard.yaml'"
    ):
        config.load(path.with_name("vitb32_mmtrd.yaml"))


@pytest.mark.parametrize("place", [lambda path: path.mkdir(), lambda path: path.symlink_to("gone")])
def test_a_file_that_is_there_and_cannot_be_read_is_not_taken_for_mistyped(tmp_path, place):
    path = tmp_path / "config.yaml"
    place(path)
    with pytest.raises(UserError) as error:
        config.load(path)
    assert str(error.value).startswith(f"cannot read configuration '{path}': ") and "mean" not in str(error.value)


def test_a_loop_of_two_bases_is_refused(write):
    write("base: b.yaml\n", "a.yaml")
    path = write("base: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="leads back to itself"):
        config.load(path)


def test_base_is_merged_under_the_file_and_overrides_go_over_both(tree, write, tmp_path):
    tree["method"]["robust_weight"] = 30
    tree["train"]["lr"] = 1e-3
    (tmp_path / "deep").mkdir()
    write(tree, "deep/root.yaml")
    write({"base": "root.yaml", "train": {"steps": 20}}, "deep/middle.yaml")
    path = write({"base": "deep/middle.yaml", "method": {"clean_weight": 2}, "attack": {"eps": "4/255"}})
    c = config.load(path, ["train.lr=5e-6", "attack.eps=1/255"])
    assert (c.train.steps, c.train.lr, c.train.batch_size) == (20, 5e-6, 8)
    assert (c.method.robust_weight, c.method.clean_weight, c.attack.eps) == (30, 2, Fraction(1, 255))


def test_another_method_replaces_the_bases_method_whole(tree, write):
    tree["method"]["robust_weight"] = 30
    tree["teachers"] = {"robust": tree["teachers"]["robust"]}
    write(tree, "base.yaml")
    c = config.load(write({"base": "base.yaml", "method": {"name": "ard", "alpha": 0.5}}))
    assert (c.method.name, c.method.alpha) == ("ard", 0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=trades", "method.beta=3"],
        ["method.beta=3", "method.name=trades"],
        ["method={name: trades, beta: 3}"],
    ],
)
def test_another_method_of_an_override_leaves_the_files_settings_behind(tree, write, overrides):
    tree["method"]["robust_weight"] = 7
    c = config.load(write(tree), ["teachers=null", *overrides])
    assert (c.method.name, c.method.beta) == ("trades", 3)
    assert config.load(write(tree), ["method.name=mmtard"]).method.robust_weight == 7


def test_another_name_elsewhere_replaces_nothing(tree, write):
    write({**tree, "log": {"wandb": {"project": "robust", "name": "a"}}}, "base.yaml")
    c = config.load(write({"base": "base.yaml", "log": {"wandb": {"name": "b"}}}))
    assert (c.log.wandb.project, c.log.wandb.name) == ("robust", "b")


@pytest.mark.parametrize(
    "overrides",
    [[], ["attack.eps=3/255", "data.crop_scale=[0.5, 1]", "data.shards=[a.tar, 'pipe:cat b.tar']", "train.lr=1e-5"]],
)
def test_what_dump_writes_loads_as_the_same_configuration(tree, write, overrides):
    c = config.load(write(tree), overrides)
    assert config.load(write(config.dump(c), "dumped.yaml")) == c


def test_dump_writes_every_setting_with_its_default_and_ratios_as_fractions(tree, write):
    dumped = yaml.safe_load(config.dump(config.load(write(tree))))
    assert dumped["attack"]["eps"] == "2/255" and dumped["data"]["max_replaced"] == "1/100"
    assert (
        dumped["train"]["grad_clip"] is None and dumped["train"]["lr"] == 2e-5 and dumped["engine"]["zero_stage"] == 2
    )


def test_differences_name_dotted_keys_and_leave_out_what_does_not_change_the_result(tree, write):
    path = write(tree)
    old = config.load(path)
    new = config.load(
        path,
        ["train.lr=1e-3", "attack.eps=4/255", "method.slope=5", "run_dir=b", "log.every=1", "resume.allow=[train]"],
    )
    assert config.differences(old, new) == {
        "attack.eps": ("2/255", "4/255"),
        "method.slope": (4.0, 5.0),
        "train.lr": (2e-5, 1e-3),
    }
    assert config.differences(old, config.load(path, ["log.tensorboard=false"])) == {}
    gone = config.load(path, ["method={name: clean}", "teachers={}"])
    assert config.differences(old, gone)["teachers.clean.weights"] == ("openai", None)


@pytest.mark.parametrize("world, micro, expected", [(1, None, 1), (2, None, 1), (4, 1, 2), (1, 2, 4), (2, 100, 1)])
def test_micro_batches_a_rank_accumulates(tree, write, world, micro, expected):
    c = config.load(write(tree), [f"train.micro_batch_size={'null' if micro is None else micro}"])
    assert config.check_world(c, world) == expected  # 8 samples / world / micro


@pytest.mark.parametrize(
    "world, micro, words",
    [
        (3, "null", "data.lanes: 4 lanes cannot be shared by 3 ranks; make it a multiple of 3"),
        (8, "null", "4 lanes cannot be shared by 8 ranks"),
        (
            2,
            "3",
            "train.micro_batch_size: 3 does not divide a rank's 4 samples (batch_size 8 over 2 ranks); "
            "choose a divisor of 4",
        ),
    ],
)
def test_a_world_that_does_not_fit(tree, write, world, micro, words):
    with pytest.raises(UserError) as error:
        config.check_world(config.load(write(tree), [f"train.micro_batch_size={micro}"]), world)
    assert words in str(error.value)


# ---------------------------------------------------------------- the untouched student, fused targets, labels


def test_a_method_that_needs_the_untouched_student_finds_it_in_the_run_folder(tree, write):
    path = write(tree)
    fare = config.load(path, ["method={name: fare}", "teachers={}", "run_dir=runs/a"])
    assert fare.teachers == {} and {n: (t.weights, t.placement) for n, t in fare.ensemble.items()} == {
        "start": ("runs/a/start", "replicated")
    }
    placed = config.load(path, ["method={name: fare}", "teachers={start: {placement: sharded}}", "run_dir=runs/a"])
    assert {n: (t.weights, t.placement) for n, t in placed.ensemble.items()} == {"start": ("runs/a/start", "sharded")}
    other = config.load(path, ["method={name: fare}", "teachers={start: {weights: openai, arch: ViT-L-14}}"])
    assert (other.ensemble["start"].weights, other.ensemble["start"].arch) == ("openai", "ViT-L-14")
    assert (
        config.differences(
            placed,
            config.load(path, ["method={name: fare}", "teachers={start: {placement: sharded}}", "run_dir=elsewhere"]),
        )
        == {}
    )
    assert config.load(path).ensemble == config.load(path).teachers


def test_a_teacher_of_the_base_is_taken_away_with_null(tree, write):
    write(tree, "base.yaml")
    c = config.load(write({"base": "base.yaml", "teachers": {"clean": None}, "method": {"name": "rslad"}}))
    assert list(c.teachers) == ["robust"]


@pytest.mark.parametrize(
    "overrides, fusion",
    [
        ([], {}),
        (["attack.objective=kl_fused"], {"clean": 0.5, "robust": 0.5}),
        (["attack={objective: kl_fused, fusion: {clean: 1, robust: 3}}"], {"clean": 0.25, "robust": 0.75}),
    ],
)
def test_the_weights_of_a_fused_target_add_up_to_one(tree, write, overrides, fusion):
    assert config.load(write(tree), overrides).fusion == fusion


@pytest.mark.parametrize(
    "overrides, needed",
    [
        ([], True),
        (["method.weighting=uniform"], False),
        (["method.weighting=uniform", "attack.objective=ce"], True),
        (["method.weighting=hardness"], True),
        (["method={name: fare}", "teachers={}"], False),
        (["method={name: fare}", "teachers={}", "attack.objective=ce_targeted"], True),
        (["method={name: tecoa}", "teachers={}"], True),
        (["method={name: tecoa}", "teachers={}", "data.targets=captions"], False),
    ],
)
def test_labels_are_needed_where_the_loss_or_the_attack_reads_them(tree, write, overrides, needed):
    assert config.load(write(tree), overrides).needs_labels is needed


CONFIGS = Path(__file__).parents[2] / "configs"


# base.yaml is what others share; tests/study has the studies.
RUNS = [p for p in sorted(CONFIGS.rglob("*.yaml")) if p.name != "base.yaml" and p.parent.name != "studies"]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_configuration_is_valid_and_opens_with_its_command(path, tmp_path):
    name, text = path.relative_to(CONFIGS.parent), path.read_text()
    c = config.load(path, [f"data.shards={tmp_path}"])
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("#") and any(str(name) in line for line in head)
    if path.parent.name in ("baselines", "ablations"):
        main = config.load(CONFIGS / "vitb32_mmtard.yaml", [f"data.shards={tmp_path}"])
        changed = {key.split(".")[0] for key in config.differences(main, c)}
        assert changed <= {"teachers", "method", "attack"} and {
            k for k in config.differences(main, c) if k.startswith("attack")
        } <= {"attack.objective", "attack.fusion", "attack.fusion.clean", "attack.fusion.robust"}
        assert c.run_dir == f"runs/{path.parent.name}/{path.stem}" and "not yet measured" in text and "Hardware" in text
        assert path.parent.name != "baselines" or c.method.name == path.stem


def test_every_method_but_the_main_one_has_its_baseline():
    written = {p.stem for p in (CONFIGS / "baselines").glob("*.yaml")}
    assert written == set(config.METHODS) - {"mmtard", "clean"}, "each needs its configs/baselines/NAME.yaml"


def test_a_configuration_without_end_is_one_line():
    with pytest.raises(UserError, match="cannot read configuration '/dev/zero': it is longer than 10 MiB"):
        config.load("/dev/zero")


@pytest.mark.parametrize("word", ["on", "off", "auto", "graphs"])
def test_on_and_off_are_words_though_yaml_takes_them_for_true_and_false(tree, write, word):
    assert config.load(write(tree), [f"engine.compile={word}"]).engine.compile == word
    assert (
        config.load(write(tree | {"engine": {"compile": {"on": True, "off": False}.get(word, word)}})).engine.compile
        == word
    )
