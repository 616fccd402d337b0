"""Evaluations are found by the hash of the weights that they measured, wherever they lie."""

import shutil

import torch
from safetensors.torch import save_file
from written import dataset, results, save, write_run

from mmtard.models.weights import tensors_sha256
from mmtard.report import finding, sources

FLAGS = [True, False]


def trained(folder, value, step=10):
    """A run whose checkpoint holds an image tower of one number; its sha256 as an evaluation has it."""
    run = folder if folder.is_dir() else write_run(folder)
    checkpoint = run / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"visual.proj": torch.full((2, 2), value)}, checkpoint / "weights.safetensors")
    return tensors_sha256({"proj": torch.full((2, 2), value)})


def measured(folder, sha256, weights="gone/elsewhere"):
    return save(results([dataset("A", FLAGS, {"2/255": FLAGS})], weights, sha256), folder)


def names(paths):
    return {source.name: len(source.evaluations) for source in sources.read(paths)}


def test_a_folder_of_runs_brings_every_evaluation_of_theirs(tmp_path):
    a, b = (trained(tmp_path / "runs" / name, value) for name, value in (("a", 1.0), ("b", 2.0)))
    measured(tmp_path / "runs" / "results" / "deep" / "x", a)
    measured(tmp_path / "runs" / "y", b)
    measured(tmp_path / "runs" / "z", "of another model", "openai")
    assert names([tmp_path / "runs"]) == {"a": 1, "b": 1, "openai": 1}


def test_runs_named_one_by_one_find_what_lies_beside_them(tmp_path):
    a, b = (trained(tmp_path / "runs" / name, value) for name, value in (("a", 1.0), ("b", 2.0)))
    measured(tmp_path / "runs" / "results" / "a", a)
    measured(tmp_path / "runs" / "results" / "b", b)
    measured(tmp_path / "runs" / "results" / "z", "of another model", "openai")
    (tmp_path / "runs" / "results" / "torn").mkdir()
    (tmp_path / "runs" / "results" / "torn" / "results.json").write_text("{")
    assert names([tmp_path / "runs" / "b", tmp_path / "runs" / "a"]) == {"b": 1, "a": 1}


def test_results_in_a_folder_of_their_own_are_given_beside_the_runs(tmp_path):
    sha256 = trained(tmp_path / "runs" / "a", 1.0)
    measured(tmp_path / "elsewhere" / "x", sha256)
    measured(tmp_path / "elsewhere" / "y", "other", "openai")
    assert names([tmp_path / "runs", tmp_path / "elsewhere"]) == {"a": 1, "openai": 1}


def test_an_evaluation_of_earlier_weights_is_not_that_of_the_run(tmp_path):
    """The same run measured at step 10, then trained on to step 20."""
    early, late = (trained(tmp_path / "a", float(step), step) for step in (10, 20))
    measured(tmp_path / "a" / "evaluations" / "early", early, str(tmp_path / "a"))
    found = sources.read([tmp_path / "a"])
    assert [(source.name, len(source.evaluations)) for source in found] == [("a", 0), (f"a {early[:8]}", 1)]
    measured(tmp_path / "a" / "evaluations" / "late", late, str(tmp_path / "a"))
    assert [len(source.evaluations) for source in sources.read([tmp_path / "a"])] == [1, 1]


def test_a_start_that_was_measured_stands_first_as_what_the_others_began_with(tmp_path, monkeypatch):
    trained(tmp_path / "runs" / "a", 1.0)
    measured(tmp_path / "runs" / "results" / "start", "start", "runs/a/start")
    monkeypatch.chdir(tmp_path / "runs")  # not where it was measured: the place is taken from above the results
    assert names([tmp_path / "runs" / "a"]) == {"a": 0, "a start": 1}
    assert list(names([tmp_path / "runs"])) == ["a start", "a"]


def test_one_bad_run_or_result_is_a_row_and_not_the_end(tmp_path):
    measured(tmp_path / "runs" / "x", trained(tmp_path / "runs" / "a", 1.0))
    bad = write_run(tmp_path / "runs" / "bad")
    (bad / "config.yaml").write_bytes(b"\xff\xfe")
    (bad / "environment.json").write_text("[]")
    (bad / "metrics.jsonl").write_text('{"step": "x"}\n{"step": 1, "loss": 1e999}\n[]\n{"step": 2, "loss": "red"}\n')
    (bad / "resume.jsonl").write_text('[]\n{"step": 0, "end": 3}\n{"end": {"kind": []}}\n')
    (bad / "probes.jsonl").write_text('{"step": 1, "clean": 2, "n": 0}\n')
    torn = tmp_path / "runs" / "torn"
    torn.mkdir()
    (torn / "results.json").write_text("{")
    found = {source.name: source for source in sources.read([tmp_path / "runs"])}
    assert found["a"].evaluations and not found["a"].problem and list(found) == ["a", "bad", "runs"]
    assert found["bad"].starts == [] and found["bad"].environment is None and len(found["bad"].metrics) == 2
    assert "1 of 3 rows name no step" in " ".join(found["bad"].missing)
    assert (
        found["runs"].problem
        == f"an evaluation: '{torn / 'results.json'}' is not JSON; give a results.json that `mmtard evaluate` wrote"
    )


def test_labels_name_the_models_in_their_order(tmp_path):
    import pytest

    from mmtard.errors import UserError

    runs = [tmp_path / "runs" / name for name in "ab"]
    for value, run in enumerate(runs):
        trained(run, float(value))
    assert [s.name for s in sources.read(runs, ["first", "second"])] == ["first", "second"]
    assert [s.name for s in sources.read([tmp_path / "runs"], ["first", "second"])] == ["first", "second"]
    with pytest.raises(UserError, match=r"--labels: 3 for 2 models \(a, b\); give one for each"):
        sources.read(runs, ["x", "y", "z"])
    with pytest.raises(UserError, match="one stands there twice"):
        sources.read(runs, ["x", "x"])


def test_a_checkpoint_that_is_retired_while_it_is_read_gives_way_to_the_newer_one(tmp_path, monkeypatch):
    trained(tmp_path / "a", 1.0)
    read, newer = finding.load_file, []

    def retired(path):
        if not newer:
            newer.append(trained(tmp_path / "a", 2.0, 20))
            shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-10")
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")
        return read(path)

    monkeypatch.setattr(finding, "load_file", retired)
    assert finding.Weights(tmp_path / "a").newest == newer[0]
