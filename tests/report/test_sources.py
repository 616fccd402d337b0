import os
from pathlib import Path

import pytest
import torch
from written import PROBES, dataset, results, save, write_run

from mmtard.errors import UserError
from mmtard.report import sources
from mmtard.runs.checkpoint_writer import Checkpoints


def test_a_run_brings_its_files_and_says_what_it_lacks(tmp_path):
    folder = write_run(tmp_path / "a", probes=None)
    (source,) = sources.read([folder])
    assert (source.name, len(source.metrics), source.starts[0]["world_size"]) == (
        "a",
        10,
        2,
    )  # the line cut short is left out
    assert source.missing == [
        "clean and robust accuracy during training: no probes.jsonl",
        f"accuracy under attack: no evaluation of these weights was found; mmtard evaluate {folder} --data ROOT",
    ]
    (folder / "environment.json").unlink()
    (folder / "metrics.jsonl").unlink()
    (source,) = sources.read([folder])
    assert [text.partition(":")[0] for text in source.missing[:2]] == [
        "versions, hosts and the command",
        "training curves",
    ]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    names = [
        s.name
        for s in sources.read([write_run(tmp_path / "x/a"), write_run(tmp_path / "y/a"), write_run(tmp_path / "b")])
    ]
    assert names == ["a", "y/a", "b"]
    assert [s.name for s in sources.read([tmp_path / "b"] * 2)][0] == "b" != sources.read([tmp_path / "b"] * 2)[1].name


def test_results_alone_are_a_source_for_each_model(tmp_path):
    flags = [True, False]
    save(results([dataset("A", flags, {"2/255": flags})], weights="exported/one", sha256="1"), tmp_path / "all" / "x")
    save(results([dataset("B", flags, {"2/255": flags})], weights="exported/one", sha256="1"), tmp_path / "all" / "y")
    save(results([dataset("A", flags, {"2/255": flags})], weights="two.pt", sha256="2"), tmp_path / "all" / "z")
    found = {s.name: len(s.evaluations) for s in sources.read([tmp_path / "all"])}
    assert found == {"one": 2, "two.pt": 1}
    (source,) = sources.read([tmp_path / "all" / "z" / "results.json"])
    assert source.name == "z" and not source.is_run and "training" in source.missing[0]


def test_a_folder_whose_evaluations_are_all_of_runs_before_it_adds_none(tmp_path):
    """`mmtard report runs evaluations` after `mmtard evaluate runs/a --out evaluations/a`."""
    flags, run = [True, False], write_run(tmp_path / "runs" / "a")
    save(results([dataset("A", flags, {"2/255": flags})], weights=str(run)), tmp_path / "evaluations" / "a")
    (source,) = sources.read([tmp_path / "runs", tmp_path / "evaluations"])
    assert (source.name, len(source.evaluations)) == ("a", 1)


def test_other_weights_of_a_run_are_sources_of_their_own(tmp_path):
    """Final weights on one set, and then others of the same run on another, must not stand in one column."""
    flags, folder = [True, False], write_run(tmp_path / "b32")
    measured = [
        ("1", "runs/b32", False),
        ("2", "runs/b32", False),
        ("3", "runs/b32/checkpoints/most_robust", False),
        ("4", "runs/b32", True),
        ("2", "b32/checkpoints/step-10", False),
    ]
    for i, (sha256, weights, ema) in enumerate(measured):
        content = results([dataset("A", flags, {"2/255": flags})], weights, sha256)
        content["model"]["ema"] = ema
        os.utime(save(content, folder / "evaluations" / str(i)), (1e9 + i, 1e9 + i))
    found = sources.read([folder, write_run(tmp_path / "other" / "b32")])
    assert [(s.name, [e.model.sha256 for e in s.evaluations]) for s in found] == [
        ("b32", ["2", "2"]), ("b32 1", ["1"]), ("b32 most_robust", ["3"]), ("b32 ema", ["4"]), ("other/b32", []),
    ]  # fmt: skip
    assert found[0].is_run and found[0].metrics and not any(s.is_run or s.metrics for s in found[1:4])
    assert found[2].missing == [f"training: these are other weights than the newest of the run '{folder}'"]
    assert [(s.name, len(s.evaluations)) for s in sources.read([folder / "evaluations"])] == [
        ("b32", 1),
        ("b32 step-10", 2),
        ("b32 most_robust", 1),
        ("b32 ema", 1),
    ]


def test_an_adapter_that_was_measured_as_the_last_checkpoint_is_the_runs_own(tmp_path):
    """Its checkpoint has no hash, the tower that was measured has; a study names the checkpoint of the last step."""
    folder = write_run(tmp_path / "b32")
    saver = Checkpoints(folder, keep_last=1)
    saver.save(10, {"visual.proj.lora_A.weight": torch.ones(2)}, {}, {"step": 10})
    saver.wait()
    content = results([dataset("A", [True], {"2/255": [True]})], str(folder / "checkpoints" / "step-10"), "whole")
    save(content, folder / "evaluations" / "x")
    (run,) = sources.read([folder])
    assert (run.name, len(run.evaluations)) == ("b32", 1)


def test_a_run_of_which_a_checkpoint_alone_was_measured_says_so(tmp_path):
    folder = write_run(tmp_path / "b32")
    save(
        results([dataset("A", [True], {"2/255": [True]})], "runs/b32/checkpoints/most_robust"),
        folder / "evaluations" / "x",
    )
    run, best = sources.read([folder])
    assert (run.evaluations, best.name) == ([], "b32 most_robust")
    assert (
        "accuracy under attack: no evaluation of its newest weights; those of others have columns of their own"
        in run.missing
    )


def test_one_model_under_another_activation_is_another(tmp_path):
    flags = [True, False]
    for gelu in (True, False):
        content = results([dataset("A", flags, {"2/255": flags})], "openai")
        content["model"]["quick_gelu"] = gelu
        save(content, tmp_path / "all" / str(gelu))
    assert len(sources.read([tmp_path / "all"])) == 2


def test_a_damaged_evaluation_is_named_and_the_others_stay(tmp_path):
    folder = write_run(tmp_path / "a")
    flags = [True, False]
    save(results([dataset("A", flags, {"2/255": flags})]), folder / "evaluations" / "good")
    broken = results([dataset("A", flags, {"2/255": flags})])
    del broken["datasets"][0]["clean_all"]
    bad = save(broken, folder / "evaluations" / "bad")
    save({"format": 1}, folder / "evaluations" / "old")
    (source,) = sources.read([folder])
    assert len(source.evaluations) == 1
    told = " ".join(source.missing)
    assert f"'{bad}': clean_all: Field required" in told and "format 1, this version reads 2" in told


@pytest.mark.parametrize(
    "content, words",
    [(None, "does not exist"), ("", "neither a run's folder nor holds a results.json"), ("{", "is not JSON")],
)
def test_what_is_neither_is_refused(tmp_path, content, words):
    path = tmp_path / "thing"
    if content is not None:
        path.mkdir()
    if content:
        (path / "results.json").write_text(content)
    with pytest.raises(UserError, match=words):
        sources.read([path])


def test_what_is_neither_a_file_nor_a_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="'/dev/null' is neither a file nor a folder; give a run's folder"):
        sources.read([Path("/dev/null")])


def test_probes_of_other_data_are_left_out_and_the_others_stand_in_their_order(tmp_path):
    """After the data were rewritten, the newest checkpoint is measured first, and earlier ones anew."""
    steps = [(2, "a"), (4, "a"), (4, "b"), (2, "b")]
    rows = [{**PROBES[0], "step": step, "protocol": {"fingerprint": of}} for step, of in steps]
    (source,) = sources.read([write_run(tmp_path / "a", probes=rows)])
    assert [(row["step"], row["protocol"]["fingerprint"]) for row in source.probes] == [(2, "b"), (4, "b")]
    assert "2 of 4 were measured otherwise than the last, or on other data, and are not shown" in source.missing[0]


def test_probes_of_an_earlier_version_which_did_not_note_the_data_stand_beside_those_that_do(tmp_path):
    """As the run itself compares them, which was updated on its way."""
    noted = {"fingerprint": "a", "classes": "c"}
    protocols = {2: {"eps": "1/255"}, 4: {"eps": "2/255"}, 6: {"eps": "2/255"}, 8: {"eps": "2/255", **noted}}
    rows = [{**PROBES[0], "step": step, "protocol": protocol} for step, protocol in protocols.items()]
    (source,) = sources.read([write_run(tmp_path / "a", probes=rows)])
    assert [row["step"] for row in source.probes] == [4, 6, 8]
    assert "1 of 4 were measured otherwise than the last" in source.missing[0]
    (source,) = sources.read([write_run(tmp_path / "b", probes=rows[1:])])
    assert [row["step"] for row in source.probes] == [4, 6, 8] and "otherwise" not in " ".join(source.missing)
