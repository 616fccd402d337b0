"""Several evaluations write into one folder; a dataset is measured there by one of them at a time."""

import json

import pytest
from tiny_datasets import strip_seconds, write

from mmtard.attacks import ensemble
from mmtard.errors import UserError
from mmtard.evaluation import out_folder, partial_results, results

MEANS = {"attacks": ("pgd",), "iters": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets, `a` and `b`."""
    root = tmp_path_factory.mktemp("root")
    for name in "ab":
        write(root / name, 8, size=(8, 8))
    return root


@pytest.fixture
def meanwhile(monkeypatch):
    """Call with what another evaluation does while the first one attacks."""

    def set_up(other):
        run, begun = ensemble.run_attacks, []

        def with_other(*args):
            if not begun:
                begun.append(1)
                other()
            return run(*args)

        monkeypatch.setattr(ensemble, "run_attacks", with_other)

    return set_up


def test_evaluations_of_two_datasets_into_one_folder_at_once_lose_nothing(root, measure, meanwhile, tmp_path):
    out, kept = tmp_path / "out", []
    one_after_the_other = [measure(root / name, tmp_path / "other", **MEANS) for name in "ab"][-1]

    def other():
        measure(root / "b", out, **MEANS)
        kept.extend(path.name[:2] for path in partial_results.own_files(out / partial_results.FOLDER))

    meanwhile(other)
    found = measure(root / "a", out, **MEANS)
    assert set(kept) == {"a-"}, "a kill of the slower one loses what it measured"
    assert [d["name"] for d in found["datasets"]] == ["a", "b"] and found["averages"]["all"]["datasets"] == 2
    assert results.read(out) == json.loads(json.dumps(found)) and [p.name for p in out.iterdir()] == [results.FILE]
    by_name = {d["name"]: strip_seconds(d) for d in one_after_the_other["datasets"]}
    assert {d["name"]: strip_seconds(d) for d in found["datasets"]} == by_name


def test_a_dataset_that_another_evaluation_measures_into_the_folder_is_refused(
    root, measure, meanwhile, tmp_path, monkeypatch
):
    monkeypatch.setattr(out_folder, "PATIENCE_S", 0.1)
    told = []

    def other():
        for again in (root / "a", root):
            with pytest.raises(UserError) as error:
                measure(again, **MEANS)
            told.append(str(error.value))

    meanwhile(other)
    found = measure(root / "a", **MEANS)
    assert [d["name"] for d in found["datasets"]] == ["a"] and len(set(told)) == 1
    assert told[0].startswith(f"--out: a is being measured into '{tmp_path / 'out'}' by ") and "process" in told[0]
    assert told[0].endswith("; wait for it to end, end it, or choose another folder")


def test_what_a_killed_evaluation_held_is_free_and_nothing_is_left_where_nothing_was_measured(root, measure, tmp_path):
    (partial := tmp_path / "out" / partial_results.FOLDER).mkdir(parents=True)
    (partial / "a.lock").write_text("host process 1")
    measure(root / "a", **MEANS)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [results.FILE]
    with pytest.raises(UserError):
        measure(root / "a", tmp_path / "new" / "out", model=tmp_path / "none", **MEANS)
    assert not (tmp_path / "new").exists()


def test_results_of_other_settings_are_not_lost_to_those_of_another_dataset(root, measure, tmp_path):
    first = measure(root / "a", tmp_path, **MEANS)
    for _ in range(2):  # nothing is measured, or stored on the way
        with pytest.raises(UserError, match="--out: .* has results of another model, or of other settings, for a; "):
            measure(root / "b", tmp_path, attacks=("pgd",), iters=2)
    assert results.read(tmp_path) == json.loads(json.dumps(first))
    assert {d["name"] for d in measure(root / "b", tmp_path, **MEANS)["datasets"]} == {"a", "b"}


def test_results_of_other_settings_that_come_meanwhile_are_not_lost_either(root, measure, meanwhile, tmp_path):
    meanwhile(lambda: measure(root / "b", tmp_path, attacks=("pgd",), iters=2))
    with pytest.raises(UserError, match="--out: .* for b; choose another folder"):
        measure(root / "a", tmp_path, **MEANS)
    assert [d["name"] for d in results.read(tmp_path)["datasets"]] == ["b"]
    assert partial_results.own_files(tmp_path / partial_results.FOLDER), "what was measured is kept"


def test_the_lock_of_a_lost_node_is_waited_for(root, measure, meanwhile, tmp_path, monkeypatch, capsys):
    """A file server holds a dead client's lock for a while."""
    monkeypatch.setattr(out_folder, "PATIENCE_S", 0.1)
    monkeypatch.setattr(out_folder, "NODE_PATIENCE_S", 0.2)

    def other():
        (tmp_path / "out" / partial_results.FOLDER / "a.lock").write_text("another-node process 1")
        with pytest.raises(UserError, match="being measured into .* by another-node process 1; wait"):
            measure(root / "a", **MEANS)

    meanwhile(other)
    measure(root / "a", **MEANS)
    told = f"mmtard: --out: a is being measured into '{tmp_path / 'out'}' by another-node process 1; waiting up to 0 s"
    assert told in capsys.readouterr().err
