import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmtard import __version__, config
from mmtard.cli import config as config_command, main, runs as runs_command
from mmtard.errors import RunError, UserError

COMMANDS = next(action.choices for action in main.parser()._actions if getattr(action, "choices", None))


@pytest.fixture
def mmtard(tmp_path, tree, write, warm_python):
    """Call with arguments: `python -m mmtard` run in tmp_path beside run.yaml, where importing torch fails."""
    write(tree)
    for package in ("torch", "open_clip", "deepspeed", "numpy"):
        (tmp_path / "poison" / package).mkdir(parents=True)
        (tmp_path / "poison" / package / "__init__.py").write_text(f"raise RuntimeError('{package} was imported')")

    def call(*args, **env):
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and not k.startswith("SLURM_")
        }
        env = {
            **clean,
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "poison"), str(Path(main.__file__).parents[2])]),
            **env,
        }
        return subprocess.run(
            [warm_python, "-m", "mmtard", *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )

    return call


WRONG = [  # arguments after `train`, what the line on stderr says
    ("train.lrr=1", "did you mean 'train.lr'?"),
    ("train.steps=ten", "train.steps: 'ten'"),
    ("attack.eps=2/0", "'2/0' is not a fraction; write it as 2/255 or 0.0078"),
    ("method.name=mmtrd", "known: clean, tecoa, fare"),
    ("attack.objective=kl", "unknown objective 'kl'"),
    ("teachers.third.weights=a", "remove it"),
    ("teachers={}", "needs this teacher; add it"),
    ("train.batch_size=6", "4 lanes do not divide train.batch_size 6"),
    ("train.micro_batch_size=3", "3 does not divide a rank's 8 samples"),
    ("data.shards=gone.tar", "missing shard 'gone.tar'"),
    ("train.lr=[", "not valid YAML"),
]


def test_the_name_alone_shows_every_command_and_where_to_read_on(mmtard):
    done = mmtard()
    assert done.returncode == 2 and done.stdout == ""
    assert all(re.search(rf"^    {command}\b", done.stderr, re.MULTILINE) for command in COMMANDS)
    assert "`mmtard COMMAND --help`" in done.stderr and "error" not in done.stderr


def test_a_command_that_is_not_there_is_answered_with_the_known_ones(mmtard):
    done = mmtard("trian", "run.yaml")
    assert (
        done.returncode == 2
        and done.stderr == f"mmtard: unknown command 'trian'; known: {', '.join(sorted(COMMANDS))}\n"
    )


@pytest.mark.parametrize("override, words", WRONG, ids=[o for o, _ in WRONG])
def test_a_wrong_setting_ends_train_with_one_line_before_torch(mmtard, override, words):
    done = mmtard("train", "run.yaml", override)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mmtard: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_a_world_that_lanes_do_not_divide_ends_train_on_every_rank(mmtard):
    done = mmtard("train", "run.yaml", WORLD_SIZE="3", RANK="2")
    assert done.returncode == 2
    assert done.stderr == "mmtard (rank 2): data.lanes: 4 lanes cannot be shared by 3 ranks; make it a multiple of 3\n"


@pytest.mark.parametrize("command", ["train", "config"])
@pytest.mark.parametrize(
    "name, text, words",
    [
        ("gone.yaml", None, "cannot read configuration 'gone.yaml'"),
        ("bad.yaml", "train: [1", "bad.yaml is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used(mmtard, write, command, name, text, words):
    if text:
        write(text, name)
    done = mmtard(command, name)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_a_good_configuration_does_reach_torch(mmtard):
    """The control of the tests above: their poison acts."""
    assert "was imported" in mmtard("train", "run.yaml").stderr


def test_settings_may_follow_a_flag_but_a_wrong_flag_is_still_wrong(mmtard):
    before, after = (
        mmtard("config", "run.yaml", *words) for words in (("seed=5", "--world", "2"), ("--world", "2", "seed=5"))
    )
    assert before.returncode == after.returncode == 0 and "seed: 5" in before.stdout and before.stdout == after.stdout
    for words in (
        ("config", "run.yaml", "--wrold", "2"),
        ("config", "run.yaml", "--seed=5"),
        ("runs", "runs", "seed=5"),
    ):
        done = mmtard(*words)
        assert done.returncode == 2 and "unrecognized arguments" in done.stderr and "Traceback" not in done.stderr


def test_config_checks_what_divides_over_the_ranks_that_world_names(mmtard):
    assert mmtard("config", "run.yaml", "train.micro_batch_size=3").returncode == 0
    done = mmtard("config", "run.yaml", "train.micro_batch_size=3", "--world", "1")
    assert done.returncode == 2 and done.stderr.startswith("mmtard: train.micro_batch_size: 3 does not divide"), done


def test_config_prints_yaml_that_loads_as_the_same_configuration(mmtard, tmp_path):
    done = mmtard("config", "run.yaml", "train.lr=1e-3", "attack.eps=3/255")
    assert done.returncode == 0 and done.stderr == ""
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert config.load(tmp_path / "printed.yaml") == config.load(
        tmp_path / "run.yaml", ["train.lr=1e-3", "attack.eps=3/255"]
    )
    assert mmtard("config", "printed.yaml").stdout == done.stdout


def test_help_of_the_program_lists_every_command(mmtard):
    done = mmtard("--help")
    assert done.returncode == 0 and {
        "shards",
        "index",
        "train",
        "config",
        "preflight",
        "runs",
        "evaluate",
        "compare",
        "export",
    } <= set(COMMANDS)
    assert all(re.search(rf"\n    {name}[ \n]", done.stdout) for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "submit"])  # which has a parser of its own
def test_help_of_a_command_shows_what_it_does_and_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as end:
        main.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: mmtard {command}" in text
    examples = [line.partition("mmtard ")[2] for line in text.partition("example: ")[2].splitlines()]
    assert examples and examples[0].split()[0] == command
    for example in examples:
        assert callable(main.parse(example.replace("'", "").split()).run)


def test_a_list_may_be_given_in_several_flags():
    argv = ["evaluate", "m", "--data", "d"]
    asked = main.parser().parse_args([*argv, "--eps", "1/255", "--eps", "2/255", "4/255", "--attacks", "pgd"])
    assert [float(255 * e) for e in asked.eps] == [1, 2, 4] and asked.attacks == ["pgd"]
    assert main.parser().parse_args(argv).eps is None


def test_the_help_of_evaluate_names_every_attack_and_protocol():
    from mmtard.attacks.registry import ALIASES, ATTACKS
    from mmtard.evaluation.protocols import PROTOCOLS

    told = {flag: a.help for a in COMMANDS["evaluate"]._actions for flag in a.option_strings}
    for flag, names in (("--attacks", (*ATTACKS, *ALIASES)), ("--protocol", PROTOCOLS)):
        listed = set(re.findall(r"[\w-]+", told[flag]))
        assert listed >= set(names), f"{flag} in mmtard/cli/evaluation.py: {set(names) - listed}"


def test_settings_are_not_called_required(capsys):
    with pytest.raises(SystemExit):
        main.main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG; see `mmtard train --help`\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"mmtard {__version__}\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train"], "required: CONFIG"),
        (["evaluate", "m"], "required: --data"),
        (
            ["evaluate", "m", "--data", "s", "--eps", "2/0"],
            "--eps: '2/0' is not a fraction; write it as 2/255 or 0.0078",
        ),
        (["evaluate", "m", "--data", "s", "--eps=-1/255"], "--eps: '-1/255' is negative"),
        (["evaluate", "m", "--data", "s", "--iters", "0"], "--iters: '0' is not a whole number of at least 1"),
        (["evaluate", "m", "--data", "s", "--norm", "l1"], "invalid choice: 'l1'"),
        (
            ["evaluate", "m", "--data", "s", "--n-samples", "some"],
            "--n-samples: 'some' is not a whole number of at least 1",
        ),
        (["compare"], "required: RUN"),
        (["shards", "a", "b", "--shuffle-seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["bench", "data", "vitb32_mmtard", "--quality", "101"], "'101' is not a JPEG quality; give 1 to 100"),
        (["shards", "a", "b", "--quality", "101"], "'101' is not a JPEG quality; give 1 to 100"),
        (["export", "run"], "required: OUT"),
    ],
)
def test_a_command_line_that_does_not_parse(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        main.main(argv)
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "error, status",
    [(UserError("no such thing"), 2), (RunError("no such thing"), 1), (RunError("no such thing", 75), 75)],
)
def test_the_exit_status_tells_whose_turn_it_is(monkeypatch, capsys, error, status):
    def fail(args):
        raise error

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(config_command, "_config", fail)
    assert main.main(["config", "run.yaml"]) == status
    assert capsys.readouterr().err == "mmtard: no such thing\n"


@pytest.mark.parametrize("words", [("train", "run.yaml"), ("config", "--may-start", "now", "run.yaml")])
def test_a_run_that_was_started_too_often_ends_with_one_line_before_torch(mmtard, tmp_path, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.jsonl").write_text('{"step": 0}\n' * 3)
    done = mmtard(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert (
        f"mmtard: '{tmp_path / 'run'}': the last 3 starts began at step 0 and left no newer checkpoint" in done.stderr
    )
    assert mmtard("config", "run.yaml").returncode == 0


def test_a_start_that_ended_before_it_was_noted_is_not_repeated(mmtard, tmp_path):
    words, job = ("config", "--may-start", "again", "run.yaml"), {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}
    for history, status in (
        ("", 1),
        ('{"step": 0, "job": "5", "restart": 0}\n', 1),
        ('{"step": 0, "job": "5", "restart": 1}\n', 0),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "resume.jsonl").write_text(history)
        done = mmtard(*words, **job)
        assert done.returncode == status and (
            "this start ended before the run's folder was prepared" in done.stderr
        ) == bool(status)


@pytest.mark.parametrize("kind", ["failed", "stopped"])
def test_a_start_that_failed_or_was_stopped_is_left_to_the_user_to_repeat(mmtard, tmp_path, kind):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.jsonl").write_text(
        f'{{"step": 0, "job": "5", "restart": 0, "end": {{"kind": "{kind}", "reason": "rank 1: out of memory"}}}}\n'
    )
    done = mmtard("config", "--may-start", "again", "run.yaml", SLURM_JOB_ID="5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"mmtard: '{tmp_path / 'run'}': this start ended as {kind}: rank 1: out of memory; "
        "it is not repeated by itself, submit it again"
    )
    assert mmtard("config", "--may-start", "now", "run.yaml", SLURM_JOB_ID="6").returncode == 0


def test_runs_needs_no_torch(mmtard, tmp_path):
    done = mmtard("runs", ".")
    assert (done.returncode, done.stderr) == (2, "mmtard: no run below '.'; give the folder that holds your run_dirs\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resume.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "run.yaml").read_text())
    done = mmtard("runs", ".")
    assert done.returncode == 0 and "killed, or its node lost" in done.stdout and "0/10" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "gone.tar"], "--data: missing shard 'gone.tar'; correct the pattern or restore the file"),
        (["--data", "shards", "--datasets", "pets"], "unknown dataset in 'shards' 'pets'; known: shards"),
        (
            ["--data", "shards", "--protocol", "fair"],
            "unknown protocol 'fair'; known: autoattack, fare, quick, robustbench, tecoa",
        ),
        (["--data", "shards", "--eps", "0"], "--eps: 0 is no attack; write a positive size such as 2/255"),
        (
            ["--data", "shards", "--attacks", "transfer"],
            "--attacks: 'transfer' needs the model whose gradients it follows; name it with --transfer-from",
        ),
    ],
)
def test_evaluate_says_what_is_wrong_before_torch(mmtard, words, message):
    done = mmtard("evaluate", "openai", "--arch", "ViT-B-32", *words)
    assert (done.returncode, done.stderr) == (2, f"mmtard: {message}\n")


def test_the_deepspeed_launchers_local_rank_is_accepted_where_it_puts_it(mmtard):
    """launcher/launch.py starts `python -m MODULE --local_rank=N ARGUMENTS`: before the command."""
    done = mmtard("--local_rank=0", "config", "run.yaml")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["train"]["steps"] == 10, done.stderr


@pytest.mark.parametrize(
    "command, message, told",
    [
        ("index", "data.shards: missing shard 'x'", "SHARDS: missing shard 'x'"),
        ("index", "data.shards: missing shard 'my.data.shards.tar'", "SHARDS: missing shard 'my.data.shards.tar'"),
        ("export", "export.weights: 'x' does not exist", "RUN: 'x' does not exist"),
        ("train", "data.shards: missing shard 'x'", "data.shards: missing shard 'x'"),
    ],
)  # fmt: skip
def test_messages_of_a_command_name_its_own_flags(monkeypatch, capsys, command, message, told):
    from mmtard.cli import data, runs, training

    def fail(*args):
        raise UserError(message)

    words = {"index": ["x"], "export": ["r", "o"], "train": ["vitb32_mmtard"]}[command]
    module = {"index": data, "export": runs, "train": training}[command]
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(module, f"_{command}", fail)
    assert main.main([command, *words]) == 2
    assert capsys.readouterr().err == f"mmtard: {told}\n"


def test_a_reader_that_goes_away_ends_a_listing_without_a_traceback(tmp_path):
    """As in `mmtard config --explain | head -1`."""
    script = f"{sys.executable} -m mmtard config --explain | true; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[2])}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("words", [["runs", "x" * 300], ["evaluate", "x" * 300, "--data", "x" * 300]])
def test_a_name_that_no_file_system_takes_is_one_line(words, capsys):
    assert main.main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 51 GB")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def too_much(args):
        raise error

    monkeypatch.setattr(runs_command, "_runs", too_much)
    assert main.main(["runs", "."]) == 1
    assert capsys.readouterr().err.startswith("mmtard: this machine has too little memory for what was asked (")


def test_another_error_within_the_program_is_not_hidden(monkeypatch):
    def broken(args):
        raise RuntimeError("a fault of mmtard")

    monkeypatch.setattr(runs_command, "_runs", broken)
    with pytest.raises(RuntimeError, match="a fault of mmtard"):
        main.main(["runs", "."])


def test_arguments_that_do_not_fit_are_told_in_one_line(capsys):
    for words, line in (
        (["study", "shapess"], "mmtard study: argument CONFIG: unknown study 'shapess'; known: cifar, "),
        (["evaluate", "runs/b32"], "mmtard evaluate: the following arguments are required: --data; see `mmtard eval"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main.main(words)
        err = capsys.readouterr().err
        assert err.startswith(line) and err.count("\n") == 1
