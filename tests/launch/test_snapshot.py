"""What a submission keeps of the code: from a checkout (tests/launch/test_submit.py) and from an installed wheel."""

import json

from mmtard import resources
from mmtard.launch.plan import Plan
from mmtard.launch.snapshot import Snapshot


def test_a_submission_from_an_installed_wheel_keeps_its_code_and_configurations(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "mmtard"
    (package / "_files" / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1'\n")
    (package / "_files" / "configs" / "a.yaml").write_text("seed: 1\n")
    (tmp_path / ".git").mkdir()  # of a project that the environment lies in: no history of mmtard's
    monkeypatch.setattr(resources, "PACKAGE", package)
    snapshot = Snapshot(tmp_path / "run")
    snapshot.write(Plan(tmp_path / "run", [], []))
    assert (snapshot.code / "mmtard" / "__init__.py").is_file()
    assert (snapshot.code / "configs" / "a.yaml").read_text() == "seed: 1\n"
    assert json.loads((snapshot.folder / "submission.json").read_text())["git"] is None
