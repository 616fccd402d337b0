"""What a single value may be: numbers without surprises, paths as a shell writes them, text that breaks no line."""

import argparse
from fractions import Fraction

import pytest

from mmtard import config
from mmtard.config import argument_types, parse_fraction
from mmtard.config.values import expand_path
from mmtard.data.paths import expand_shards
from mmtard.errors import UserError


@pytest.mark.parametrize(
    "text, value",
    [
        ("2/255", Fraction(2, 255)),
        ("0.5/255", Fraction(1, 510)),
        (" 4 / 255 ", Fraction(4, 255)),
        (".25/255", Fraction(1, 1020)),
        ("7.8e-3", Fraction(78, 10000)),
        (0.25, Fraction(1, 4)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
)
def test_a_radius_is_an_exact_fraction_however_it_is_written(text, value):
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["2/0", "1/0.0", "8px", "", "1/2/3", "nan", "inf", "1e999999999", "9" * 200, "\0"])
def test_what_is_no_fraction_is_answered_at_once_and_in_few_words(text):
    with pytest.raises(ValueError, match="is not a fraction; write it as 2/255 or 0.0078") as error:
        parse_fraction(text)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "text, filled",
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("$SCRATCH/runs/a", "/scratch/me/runs/a"),
        ("${SCRATCH}/{0..3}.tar", "/scratch/me/{0..3}.tar"),
        ("runs/$SCRATCH", "runs//scratch/me"),
        ("a$b/c$1", "a$b/c$1"),
        ("runs/$NOWHERE", "runs/$NOWHERE"),
        ("a~/b~", "a~/b~"),
        ("pipe:cat $SCRATCH/x.tar", "pipe:cat $SCRATCH/x.tar"),
        ("s3://bucket/~/$SCRATCH", "s3://bucket/~/$SCRATCH"),
        ("hf-hub:org/name", "hf-hub:org/name"),
    ],
)
def test_home_and_variables_of_a_path_are_filled_in_and_openers_stay(home, text, filled):
    assert expand_path(text) == filled.replace("HOME", str(home))


def test_a_path_that_begins_with_a_variable_that_is_not_set_is_refused(home):
    with pytest.raises(ValueError, match=r"'\$NOWHERE/x': the environment has no variable NOWHERE; set it, or write"):
        expand_path("$NOWHERE/x")
    with pytest.raises(argparse.ArgumentTypeError, match="no variable NOWHERE"):
        argument_types.path("${NOWHERE}/x")


PATH_SETTINGS = [
    "run_dir", "student.weights", "student.arch", "student.text", "teachers.clean.weights", "data.index",
    "data.classnames", "data.templates", "data.embeddings", "data.shards", "probe.data", "probe.index",
    "probe.classnames",
]  # fmt: skip


@pytest.mark.parametrize("key", PATH_SETTINGS)
def test_every_setting_that_is_a_path_takes_home_and_variables(home, tree, write, key):
    tree["probe"] = {"data": "x", "every": 500}
    value = config.load(write(tree), [f"{key}=~/there"])
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == f"{home}/there"


def test_a_list_of_shards_takes_home_and_variables(home, tree, write):
    (home / "0.tar").touch()
    c = config.load(write(tree), ["data.shards=['~/{0..0}.tar', 'pipe:cat $SCRATCH/x.tar']"])
    assert expand_shards(c.data.shards) == [f"{home}/0.tar", "pipe:cat $SCRATCH/x.tar"]


@pytest.mark.parametrize("text", ["a\nb", "a\r", "\x1b[31m", "a\tb", "a\u2028b", "a\u0085b", "\ud800"])
@pytest.mark.parametrize("key", ["run_dir", "data.shards", "teachers.clean.weights", "log.wandb.project"])
def test_a_control_character_in_any_text_is_refused_by_name(tree, key, text):
    section, parts = tree, key.split(".")
    for part in parts[:-1]:
        section = section.setdefault(part, {})
    section[parts[-1]] = text
    with pytest.raises(UserError) as error:
        config.validate(tree)
    assert str(error.value).startswith(f"{key}: ") and "holds the control character" in str(error.value)
    assert str(error.value).isprintable()


def test_a_control_character_in_a_name_or_a_list_is_refused_too(tree):
    with pytest.raises(UserError, match=r"a key of teachers: 'a\\nb' holds the control character '\\n'; take it out"):
        config.validate({**tree, "teachers": {"a\nb": {"weights": "x"}}})
    with pytest.raises(UserError, match="data.templates.1: .*holds the control character"):
        config.validate({**tree, "data": {**tree["data"], "templates": ["a {}", "b\x00{}"]}})


@pytest.mark.parametrize("key", ["run_dir", "data.shards", "student.weights"])
def test_an_empty_path_is_refused(tree, write, key):
    """It would mean the current folder."""
    with pytest.raises(UserError, match=rf"{key}.*: '': string should have at least 1 character"):
        config.load(write(tree), [f"{key}=''"])


@pytest.mark.parametrize("text", ["-1", "0", "1.5", "x", "--1", "9" * 30, "٣", ""])
def test_a_count_of_a_flag_is_a_whole_number_of_at_least_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        argument_types.positive(text)
