"""Random values, overrides and bytes: a configuration is taken, or one readable line says why not; nothing else."""

import json
import random
import re

import pytest
import yaml

from mmtard import config
from mmtard.errors import UserError

VALUES = [
    None, True, 0, -1, 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "x", "1/0", "2/255", "1e400",
    "\0", "a\nb", "../..", [], {}, [None], [[1]], {"a": 1}, {1: 2}, {None: 1}, "ü" * 300, "${HOME}", "$NO_SUCH", "~",
    "{a,b}", "{0..3}", "{", "[", b"\xff", ["a"], {"name": "mmtard"}, {"name": []}, {"name": "clean"}, "0x10", "1_000",
    "٣", 5e-324, "-0", -0.0, "1e999999999", "9" * 5000, "\ud800", {"\n": 1}, 1e30,
]  # fmt: skip
OVERRIDES = [
    "{", "[1", "null", "&a *a", "!!int x", "2001-99-99", "? a", "- b", "@x", "`", "%", "1e3", "0o7", "~", "<<",
    "{a: b}", "!!python/x", "*x", "2024-01-01", "0b1", ":", ",", "1:30", "!!binary /w==", "{[1]: 2}", "{{}: 2}",
    "!!set {a}", "[" * 300, "{a: &a [*a]}", "1e999999999", "9" * 5000, '"\\ud800"', "{<<: 1}",
    "{<<: [a]}", "{? [a] : b}",
]  # fmt: skip
NOISE = b"{}[]:,#&*!|>'\"%@`\n\t \xff-?0"


@pytest.fixture
def full(tree):
    """A configuration with a value at every key."""
    tree["probe"] = {"data": "x", "every": 500}
    tree["log"] = {"wandb": {"project": "p"}}
    tree["student"]["lora"] = {"r": 4}
    tree["attack"] = {"objective": "kl_fused", "fusion": {"clean": 1, "robust": 2}}
    return yaml.safe_load(config.dump(config.validate(tree)))


def places(tree, place=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*place, key)
        yield from places(value, (*place, key))


def answered(load, about):
    """What `load` gives, or None where it refuses in one readable line."""
    try:
        return load()
    except UserError as error:
        message = str(error)
        assert len(message) < 3000 and " ".join(message.split()).isprintable(), (about, message[:500])
    except RecursionError as error:
        raise AssertionError(about) from error
    return None


def test_random_values_at_every_key(full, write, tmp_path):
    rng, every, taken = random.Random(11), list(places(full)), 0
    for _ in range(700):
        tree, about = json.loads(json.dumps(full)), []
        for place in rng.choices(every, k=rng.choice([1, 1, 2, 3])):
            section = tree
            try:
                for key in place[:-1]:
                    section = section[key]
                section[place[-1]] = value = rng.choice(VALUES)
            except (KeyError, TypeError, IndexError):
                continue  # an earlier change took the section away
            about.append((place, value))
        found = answered(lambda tree=tree: config.validate(tree), about)
        if found is not None:
            taken += 1
            again = config.load(write(config.dump(found), "again.yaml"))
            assert again == found and config.differences(found, again) == {}, about
            answered(lambda found=found: config.check_world(found, 2), about)
            assert isinstance(found.ensemble, dict) and abs(sum(found.fusion.values()) - bool(found.fusion)) < 1e-6
    assert taken > 40  # the changes are not all refused at the first word


def test_random_overrides(full, write):
    path, rng, every = write(full), random.Random(12), [".".join(map(str, place)) for place in places(full)]
    for key in rng.choices(every, k=250):
        override = f"{key}={rng.choice(OVERRIDES)}"
        answered(lambda override=override: config.load(path, [override]), override)


def test_random_bytes_in_a_file(full, tmp_path):
    rng, text, path = random.Random(13), config.dump(config.validate(full)).encode(), tmp_path / "run.yaml"
    for _ in range(250):
        damaged = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.randrange(3)] = bytes([rng.choice(NOISE)])
        path.write_bytes(bytes(damaged))
        answered(lambda: config.load(path), re.sub(rb"\s+", b" ", bytes(damaged[:200])))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "&a {a: *a}",
        "[" * 1200,
        "{a: " * 3000,
        "a: !!binary x",
        "? {a: 1}\n: 2",
        "<<: 5",
        "[a]: 1",
        "1: 2",
        "\0",
    ],
)
def test_yaml_that_turns_in_on_itself_or_has_no_names(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert answered(lambda: config.load(path), text[:50]) is None
