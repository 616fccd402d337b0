"""A study whose trainings are jobs of Slurm: what is submitted, and what waits for what."""

import pytest
from tiny_study import tree, write

from mmtard.cli.main import main
from mmtard.study import cluster


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
