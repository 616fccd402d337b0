"""The studies that come with mmtard: valid, compared at one budget, and opened by the command that runs them."""

from pathlib import Path

import pytest

from mmtard import resources
from mmtard.examples import materials
from mmtard.study import loading, runs

STUDIES = resources.studies()


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_fits_and_opens_with_its_command_and_what_to_expect(name):
    path = STUDIES[name]
    study = loading.load(path)
    runs.check(study)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"mmtard study {name}" in line for line in head)
    assert any("Hardware" in line for line in head) and any("Expected" in line for line in head)
    assert study.out == ("runs/quickstart" if name == "quickstart" else f"runs/studies/{name}")
    assert all(len(text) > 20 for text in (study.title, study.question))


@pytest.mark.parametrize("name", STUDIES)
def test_no_study_chooses_its_settings_by_what_it_shows(name):
    study = loading.load(STUDIES[name])
    shown = {Path(m.data) for m in study.evaluations.values()}
    held_back = {Path(m.data) for m in study.validation.values()}
    trained = {Path(runs.configuration(study, run).data.shards) for run in runs.tuning_runs(study)[:1]}
    assert not shown & (held_back | trained) and not held_back & trained


def test_the_study_that_the_page_begins_with_fits(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    study = loading.load(file)
    runs.check(study)
    materials.check(study)
    assert len(study.methods) == 2 and [m.baseline for m in study.methods.values()] == [True, False]
