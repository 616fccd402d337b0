"""Commands that begin things: configs, init, submit, completion; configurations by their names."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mmtard import config, resources
from mmtard.cli import launch
from mmtard.cli.main import main, parser
from mmtard.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, as a user of an installed wheel has it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_configs_lists_every_run_with_what_it_says_of_itself(capsys):
    assert main(["configs"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    runs = {p for p in CONFIGS.rglob("*.yaml") if p.name != "base.yaml" and p.parent.name != "studies"}
    assert lines.keys() == {str(p.relative_to(CONFIGS).with_suffix("")) for p in runs}
    assert lines["vitb32_mmtard"].startswith("The main run: a robust ViT-B/32")
    assert not [name for name, line in lines.items() if "torchrun" in line or len(line) < 20]


@pytest.mark.parametrize(
    "name, file",
    [
        ("vitb32_mmtard", "vitb32_mmtard.yaml"),
        ("baselines/fare", "baselines/fare.yaml"),
        ("sim_clip", "baselines/sim_clip.yaml"),
        ("configs/vitb32_mmtard.yaml", "vitb32_mmtard.yaml"),
        ("teachers/tecoa2_rn50.yaml", "teachers/tecoa2_rn50.yaml"),
    ],
)
def test_a_configuration_of_mmtards_own_is_found_by_its_name(name, file):
    assert resources.find_config(name).samefile(CONFIGS / file)


def test_a_file_comes_before_a_name(elsewhere):
    (elsewhere / "configs").mkdir()
    mine = elsewhere / "configs" / "vitb32_mmtard.yaml"
    mine.write_text("seed: 1\n")
    assert resources.find_config("configs/vitb32_mmtard.yaml") == Path("configs/vitb32_mmtard.yaml")
    assert resources.find_config("vitb32_mmtard").samefile(CONFIGS / "vitb32_mmtard.yaml")
    assert resources.find_config(mine) == mine


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "vitb32",
            "unknown configuration 'vitb32'; did you mean vitb32_lora_mmtard, vitb32_mmtard, vitb32_official, "
            "vitb32_ours",
        ),
        ("vitb32_mmtrad", "unknown configuration 'vitb32_mmtrad'; did you mean vitb32_mmtard"),
        ("zzz", "unknown configuration 'zzz'; write a name or the path of a YAML file; `mmtard configs` lists"),
    ],
)
def test_a_name_that_is_none_is_answered_with_those_near_it(name, words, capsys):
    with pytest.raises(UserError, match=words):
        resources.find_config(name)
    with pytest.raises(SystemExit) as end:
        main(["train", name])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_name_that_several_have_is_answered_with_all_of_them(monkeypatch):
    two = {name: CONFIGS / "baselines" / "fare.yaml" for name in ("baselines/fare", "mine/fare")}
    monkeypatch.setattr(resources, "configurations", lambda: two)
    with pytest.raises(
        UserError, match="several configurations are called 'fare'; write one of baselines/fare, mine/fare"
    ):
        resources.find_config("fare")


def test_a_path_that_does_not_exist_is_left_to_its_reader():
    assert resources.find_config("runs/gone.yaml") == Path("runs/gone.yaml")
    assert main(["config", "runs/gone.yaml"]) == 2


# ---------------------------------------------------------------- init


def test_init_writes_a_configuration_that_loads_and_a_script_that_names_it(elsewhere, capsys):
    assert main(["init", "mine"]) == 0
    folder = Path("mine")
    assert {p.name for p in folder.iterdir()} == {"vitb32_mmtard.yaml", "vitb32_mmtard.sh"}
    assert config.load(folder / "vitb32_mmtard.yaml") == config.load(CONFIGS / "vitb32_mmtard.yaml")
    script = (folder / "vitb32_mmtard.sh").read_text()
    assert 'mmtard.launch.batch --script "$0" train mine/vitb32_mmtard.yaml -- "$@"' in script
    assert "#SBATCH --signal=USR2@120" in script and "#SBATCH --account=" in script
    assert subprocess.run(["bash", "-n", folder / "vitb32_mmtard.sh"]).returncode == 0
    commented = (folder / "vitb32_mmtard.yaml").read_text()
    assert "sbatch mine/vitb32_mmtard.sh data.shards=" in commented and "train mine/vitb32_mmtard.yaml" in commented
    assert "configs/" not in commented and "slurm/" not in commented, "a command would run mmtard's own files"
    assert "--gpus-per-node" in script[: script.index("#SBATCH")]
    printed = capsys.readouterr().out
    assert "mine/vitb32_mmtard.yaml" in printed and "sbatch mine/vitb32_mmtard.sh" in printed


def test_init_says_how_many_gpus_its_script_asks_for_also_for_a_configuration_of_one(elsewhere, capsys):
    assert main(["init", "mine", "--config", "your_data"]) == 0
    script = Path("mine/your_data.sh").read_text()
    nodes, gpus = (re.search(rf"^#SBATCH --{word}=(\d+)$", script, re.M)[1] for word in ("nodes", "gpus-per-node"))
    printed = capsys.readouterr().out
    assert f"mine/your_data.sh asks for {nodes} nodes of {gpus} GPUs" in printed and "Edit that size, " in printed
    assert f"# Trains on {nodes} nodes of {gpus} GPUs:" in script


def test_init_takes_along_what_a_configuration_builds_on():
    assert main(["init", "mine", "--config", "teachers/fare2_vitl14"]) == 0
    names = {p.name for p in Path("mine").iterdir()}
    assert names == {"fare2_vitl14.yaml", "tecoa2_vitl14.yaml", "vitb32_mmtard.yaml", "fare2_vitl14.sh"}
    own = config.load(CONFIGS / "teachers" / "fare2_vitl14.yaml")
    assert config.load(Path("mine/fare2_vitl14.yaml")) == own
    text = Path("mine/fare2_vitl14.yaml").read_text()
    assert yaml.safe_load(text)["base"] == "tecoa2_vitl14.yaml"
    assert "#   sbatch mine/fare2_vitl14.sh data.shards=" in text, "the script names the configuration already"


@pytest.mark.parametrize("base", ['"my base.yaml"  # shared', "'my base.yaml'", "my base.yaml # shared"])
def test_init_takes_along_a_base_however_it_is_written(elsewhere, base):
    (elsewhere / "my base.yaml").write_text((CONFIGS / "vitb32_mmtard.yaml").read_text())
    (elsewhere / "own.yaml").write_text(f"base: {base}\nseed: 3\n")
    assert main(["init", "mine", "--config", "own.yaml"]) == 0
    (elsewhere / "my base.yaml").unlink()
    assert config.load("mine/own.yaml").seed == 3


def test_init_into_a_folder_with_a_space_writes_a_script_that_names_one_file(elsewhere, capsys):
    assert main(["init", "my run", "--config", "baselines/fare"]) == 0
    script = (elsewhere / "my run" / "fare.sh").read_text()
    assert " train 'my run/fare.yaml' -- \"$@\"" in script and "sbatch 'my run/fare.sh'" in script
    assert "sbatch 'my run/fare.sh'" in (elsewhere / "my run" / "fare.yaml").read_text()
    assert "mmtard config 'my run/fare.yaml'" in capsys.readouterr().out


def test_init_overwrites_nothing(elsewhere, capsys):
    assert main(["init", "mine"]) == 0
    Path("mine/vitb32_mmtard.yaml").write_text("mine: 1\n")
    Path("mine/vitb32_mmtard.sh").unlink()
    assert main(["init", "mine"]) == 2
    assert "'mine/vitb32_mmtard.yaml' is there already" in capsys.readouterr().err
    assert Path("mine/vitb32_mmtard.yaml").read_text() == "mine: 1\n" and not Path("mine/vitb32_mmtard.sh").exists()


def test_init_into_a_place_that_takes_no_files_ends_with_one_line(elsewhere, capsys):
    Path("file").write_text("")
    assert main(["init", "file/mine"]) == 2
    assert "cannot write to 'file/mine'" in capsys.readouterr().err


# ---------------------------------------------------------------- submit, quickstart, completion


def test_submit_hands_every_word_to_the_submission(monkeypatch):
    handed = []
    monkeypatch.setattr("mmtard.launch.submit.main", lambda argv, prog: handed.append((argv, prog)) or 7)
    words = ["train.lr=1e-5", "--nodes", "4", "--dry-run", "seed=1", "--help", "--version"]
    assert main(["submit", *words]) == 7 and handed == [(words, "mmtard submit")]


def test_quickstart_becomes_the_example(monkeypatch):
    became = []
    monkeypatch.setattr(launch.os, "execv", lambda program, words: became.append(words[1:]))
    assert main(["quickstart"]) == 0 and became == [["-m", "mmtard.examples.quickstart"]]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags_and_is_a_script(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "evaluate" in script and "--transfer-from" in script and "--signal-lead" in script
    if shutil.which(shell):
        (tmp_path / "complete").write_text(script)
        assert subprocess.run([shell, "-n", tmp_path / "complete"]).returncode == 0


def test_every_command_of_the_program_belongs_to_one_group():
    commands = next(action for action in parser()._actions if getattr(action, "choices", None))
    assert {"quickstart", "configs", "init", "submit", "completion", "config", "train"} <= commands.choices.keys()
