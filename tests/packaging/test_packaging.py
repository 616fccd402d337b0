"""What is installed: the packages, the files beside them, and what an installation may do without."""

import configparser
import email
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from mmtard.cli.main import OPTIONAL

ROOT = Path(__file__).parents[2]
OPTIONAL_REQUIREMENTS = {"deepspeed", "webdataset", "submitit", "matplotlib", "tensorboard"}


@pytest.fixture(scope="module")
def setup():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def lines(text):
    return [line for line in text.split("\n") if line and not line.startswith("#")]


def test_setup_lists_every_package_that_there_is(setup):
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "mmtard").rglob("__init__.py")}
    beside = {"mmtard._files.configs", "mmtard._files.slurm"}
    assert set(lines(setup["options"]["packages"])) == folders | beside
    assert not {p.parent for p in (ROOT / "mmtard").rglob("*.py")} - {
        ROOT / Path(*name.split(".")) for name in folders
    }, "a folder of modules without __init__.py"


def test_every_file_beside_the_modules_is_named_for_the_wheel(setup):
    data = {key: lines(value.replace(", ", "\n")) for key, value in setup["options.package_data"].items()}
    for package, folder in {
        "mmtard": "mmtard",
        "mmtard._files.configs": "configs",
        "mmtard._files.slurm": "slurm",
    }.items():
        named = {path for pattern in data[package] for path in (ROOT / folder).glob(pattern)}
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True).stdout.split()
        present = {ROOT / name for name in tracked} or {p for p in (ROOT / folder).rglob("*") if p.is_file()}
        assert {p for p in present if p.suffix != ".py"} <= named


def test_what_only_measures_needs_all_but_the_optional_packages(setup):
    everything = set(lines(setup["options"]["install_requires"]))
    measuring = set(lines((ROOT / "requirements-measure.txt").read_text()))
    assert measuring == {line for line in everything if re.split(r"[ <>=]", line)[0] not in OPTIONAL_REQUIREMENTS}
    assert OPTIONAL_REQUIREMENTS <= OPTIONAL.keys()


def test_the_citation_is_one_and_names_the_paper():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "license"} <= cff.keys()
    assert "arXiv:2511.17448" in str(cff["preferred-citation"])


# ---------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built offline from its tracked files."""
    pytest.importorskip("setuptools", minversion="68")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not names:
        pytest.skip("needs git and a checkout, to know which files belong to it")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's files alone, as pip lays them."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(installed, cwd, *words, blocked=()):
    """`python -m mmtard WORDS` of the wheel in `cwd`, where the `blocked` packages cannot be imported."""
    poison = cwd / "poison"
    for name in blocked:
        (poison / name).mkdir(parents=True, exist_ok=True)
        (poison / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")}
    env["PYTHONPATH"] = os.pathsep.join([str(poison), str(installed)])
    command = [sys.executable, "-m", "mmtard", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_carries_configurations_and_scripts_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("METADATA"))))
    for folder in ("configs", "slurm"):
        here = {f"mmtard/_files/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*") if p.is_file()}
        assert here and {n for n in here if n.endswith((".yaml", ".sh"))} <= names
    assert "mmtard/py.typed" in names and not [n for n in names if n.startswith("tests/")]
    assert metadata["License"] == "Apache-2.0" and metadata.get_all("Project-URL")
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier")


def test_an_installed_wheel_in_an_empty_folder_knows_its_configurations(installed, tmp_path):
    listed = run(installed, tmp_path, "configs")
    assert listed.returncode == 0 and "vitb32_mmtard" in listed.stdout, listed.stderr
    resolved = run(installed, tmp_path, "config", "baselines/fare", "data.shards=x")
    assert yaml.safe_load(resolved.stdout)["method"] == {"name": "fare"}
    begun = run(installed, tmp_path, "init", "mine")
    assert begun.returncode == 0 and (tmp_path / "mine" / "vitb32_mmtard.sh").is_file(), begun.stderr
    trained = run(installed, tmp_path, "train", "vitb32_mmtard", blocked=["torch"])
    assert (trained.returncode, trained.stderr.count("\n")) == (2, 1) and "missing shard" in trained.stderr


def test_submitting_without_submitit_names_it_in_one_line(installed, tmp_path, tree, write):
    write(tree)
    words = ("submit", "--dry-run", "--gpus-per-node", "4", "--config", "run.yaml")
    done = run(installed, tmp_path, *words, blocked=["submitit"])
    message = "submitit is missing in this Python; install it: python -m pip install submitit"
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_measuring_attacking_and_exporting_need_none_of_the_optional_packages_and_training_names_it(
    installed, tmp_path, tree, write
):
    """In one Python, which takes long to import torch."""
    write(tree)
    modules = [
        "mmtard.attacks.ensemble", "mmtard.evaluation.evaluate", "mmtard.evaluation.compare", "mmtard.export.folder",
        "mmtard.models.loading", "mmtard.data.shard_writer", "mmtard.data.index", "mmtard.api",
    ]  # fmt: skip
    script = "\n".join(
        [
            "import sys",
            f"for name in {sorted(OPTIONAL_REQUIREMENTS)!r}: sys.modules[name] = None",
            *(f"import {module}" for module in modules),
            "from mmtard.cli.main import main",
            "raise SystemExit(main(['train', 'run.yaml']))",
        ]
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    message = "mmtard: the package deepspeed is not here, for training; install it: pip install deepspeed"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == message, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_version_is_said_once(wheel):
    from mmtard import __version__

    assert wheel.name.startswith(f"mmtard-{__version__}-")
    assert importlib.metadata.version("mmtard")
