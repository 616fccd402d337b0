"""What a job is told about its nodes, and how its body fits clusters of all kinds, with stand-ins for Slurm."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmtard import config as settings
from mmtard.embeddings.settings import embedding_recipe
from mmtard.errors import UserError
from mmtard.launch import environment, requeue, resubmit

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "x", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Call with what `scontrol show hostnames` and `show node` print: Slurm's commands from here on."""

    def answer(
        hostnames="n1\nn2", node="NodeName=n1 NodeAddr=10.0.0.1 Port=1", job="JobId=7 JobState=RUNNING Requeue=1"
    ):
        cases = {"show hostnames": hostnames, "show node": node, "show job": job}
        lines = "".join(f'    "{words}"*) echo {shlex.quote(text)} ;;\n' for words, text in cases.items())
        script(tmp_path / "scontrol", f'case "$*" in\n{lines}esac')
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return answer


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_ranks_meet_at_the_first_nodes_address_and_the_jobs_own_port(slurm):
    slurm()
    told = environment.rendezvous(
        {**JOB, "SLURM_JOB_ID": "41234", "SLURM_CPUS_PER_TASK": "12", "SLURMD_NODENAME": "n2"}
    )
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.1", "11234")
    assert (told["SRUN_CPUS_PER_TASK"], told["OMP_NUM_THREADS"], told["NCCL_DEBUG"]) == ("12", "1", "WARN")


def test_a_node_without_an_address_is_met_by_its_name(slurm):
    slurm(node="NodeName=n1 State=IDLE")
    assert environment.rendezvous(JOB)["MASTER_ADDR"] == "n1"


def test_what_the_user_says_of_nccl_is_left_alone(slurm):
    slurm()
    assert environment.rendezvous({**JOB, "NCCL_DEBUG": "INFO"})["NCCL_DEBUG"] == "INFO"


def test_a_port_that_is_taken_on_this_node_is_passed_over(slurm):
    slurm()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        job = other.getsockname()[1] - environment.FIRST_PORT
        port = int(environment.rendezvous({**JOB, "SLURM_JOB_ID": str(job)})["MASTER_PORT"])
    assert port != job + environment.FIRST_PORT and environment.FIRST_PORT <= port < 30000


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_ID": "7"}, {**JOB, "SLURM_JOB_ID": "x"}])
def test_outside_a_job_the_way_to_submit_is_named(env):
    with pytest.raises(UserError, match="this is no job of Slurm; submit the script with sbatch"):
        environment.rendezvous(env)


def test_nodes_that_slurm_does_not_name_are_an_error_of_one_line(slurm):
    slurm(hostnames="")
    with pytest.raises(UserError, match=r"'scontrol show hostnames n\[1-2\]' names no node; is scontrol on the PATH\?"):
        environment.rendezvous(JOB)
    assert environment.rendezvous({**JOB, "SLURM_JOB_NODELIST": "n1"})["MASTER_ADDR"] == "10.0.0.1"


def test_the_shell_of_a_job_takes_the_exports_and_the_log_its_first_line(slurm, tmp_path):
    slurm(node="NodeName=n1 NodeAddr=$(touch${IFS}PWNED) Port=1")
    words = f'exports=$({sys.executable} -m mmtard.launch.environment) || exit; eval "$exports"; echo "$MASTER_ADDR"'
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env = {**clean, **JOB, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "$(touch${IFS}PWNED)\n" and not (tmp_path / "PWNED").exists()
    assert "job 7: start 1 on n[1-2], ranks meet at " in done.stderr


def test_the_environment_of_a_job_does_not_leak_into_the_next(monkeypatch):
    env = {"SLURM_NTASKS": "8", "SRUN_CPUS_PER_TASK": "2", "RANK": "1", "SLURM_CONF": "/c", "HOME": "/h"}
    assert requeue.outside(env) == {"SLURM_CONF": "/c", "HOME": "/h"}


def test_a_container_without_slurm_says_why_nothing_starts_again(slurm, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(requeue.CannotGoOnError) as error:
        requeue.go_on("7", lambda: resubmit.submit_script_again("run.sh", []))
    assert str(error.value) == (
        "could neither go back to the queue (scontrol is not on the PATH here, as in a container without Slurm) nor be "
        "submitted again ([Errno 2] No such file or directory: 'sbatch'); "
        "the same sbatch command goes on from the saved state"
    )


def test_a_job_that_is_submitted_again_stays_in_its_reservation(slurm, tmp_path, monkeypatch):
    slurm()
    script(tmp_path / "sbatch", f'printf "%s\\n" "$@" >{tmp_path}/words\necho 8')
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in {**JOB, "SLURM_JOB_RESERVATION": "week 7"}.items():
        monkeypatch.setenv(name, value)
    assert resubmit.submit_script_again("run.sh", ["train.lr=1"]) == "8"
    words = (tmp_path / "words").read_text().splitlines()
    assert "--reservation=week 7" in words and "--nodes=2" in words and words[-2:] == ["run.sh", "train.lr=1"]


# ---------------------------------------------------------------- the body of a job


@pytest.fixture
def body(slurm, tmp_path, warm_python):
    """Call with a script of slurm/, its words and variables: the finished process, on a node with a `srun`."""
    slurm(job=f"JobId=7 JobState=RUNNING Requeue=1 StdOut={tmp_path}/job.log")
    (tmp_path / "python").symlink_to(warm_python)
    script(tmp_path / "srun", f'printf "%s\\n" "$@" >{tmp_path}/srun_words\nenv >{tmp_path}/srun_env')

    def call(name, *words, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MMTARD_"))}
        env = {**clean, **JOB, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **env}
        command = ["bash", str(ROOT / "slurm" / name), *words]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    return call


def test_modules_are_loaded_before_python_and_a_container_stands_around_the_ranks(body, tmp_path):
    (tmp_path / "setup.sh").write_text("export LOADED=cuda-13\nfalse || true\n")
    container = "apptainer exec --nv 'my image.sif'"
    done = body("evaluate.sh", "run", "a", MMTARD_SETUP=str(tmp_path / "setup.sh"), MMTARD_SRUN=container)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "srun_words").read_text().splitlines()
    assert words[2:] == [*shlex.split(container), "python", "-m", "mmtard", "evaluate", "run", "--data", "a"]
    env = (tmp_path / "srun_env").read_text().splitlines()
    assert "LOADED=cuda-13" in env


def test_a_job_submitted_with_export_none_passes_its_variables_to_the_ranks_all_the_same(body, tmp_path):
    assert body("evaluate.sh", "run", "a", SLURM_EXPORT_ENV="NONE").returncode == 0
    env = (tmp_path / "srun_env").read_text().splitlines()
    assert "SLURM_EXPORT_ENV=ALL" in env and "MASTER_ADDR=10.0.0.1" in env


def test_a_setup_file_that_is_not_there_is_named(body, tmp_path):
    done = body("evaluate.sh", "run", "a", MMTARD_SETUP=f"{tmp_path}/gone.sh")
    assert done.returncode == 2 and f"MMTARD_SETUP: '{tmp_path}/gone.sh' is no file on" in done.stderr
    assert not (tmp_path / "srun_words").exists()


@pytest.mark.parametrize(
    "name, words, task, message",
    [
        ("evaluate.sh", [], "0", "the first argument is the model, such as runs/b32"),
        ("evaluate.sh", ["run", "a"], "1", "no dataset for task 1 of the array"),
        ("evaluate.sh", ["run", "--", "--attacks", "pgd"], "0", "no dataset for task 0 of the array"),
        ("evaluate.sh", ["run", "a", "b"], "0", "2 datasets, 1 task: submit with --array=0-1, or give one dataset"),
        ("evaluate.sh", ["run", "a", "b", "--", "x"], "", "2 datasets, 1 task: submit with --array=0-1, or give"),
        ("train_teachers.sh", [], "2", "no configuration for task 2 of the array; ask for --array=0-1"),
    ],
)
def test_words_that_are_missing_are_told_before_any_rank_starts(body, tmp_path, name, words, task, message):
    done = body(name, *words, SLURM_ARRAY_TASK_ID=task)
    assert done.returncode == 2 and done.stderr.startswith(f"mmtard: {message}"), done.stderr
    assert not (tmp_path / "srun_words").exists()


@pytest.mark.parametrize(
    "first, task, last, again, said",
    [
        (0, 0, 2, {}, False),
        (0, 2, 2, {}, False),
        (2, 2, 2, {}, False),  # a person submits the last one anew
        (0, 0, 2, {"SLURM_RESTART_COUNT": "1"}, False),
        (0, 0, 0, {"MMTARD_SUBMITTED_AGAIN": "1"}, False),  # a job of its own for task 0, which may not be requeued
        (0, 0, 1, {}, True),
        (1, 1, 1, {}, True),
    ],
)
def test_a_task_of_an_array_measures_its_dataset_and_says_which_have_no_task(
    body, tmp_path, first, task, last, again, said
):
    bounds = {"MIN": first, "MAX": last, "COUNT": last - first + 1, "ID": task}
    array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in bounds.items()}
    done = body("evaluate.sh", "run", "a", "b", "c", SLURM_ARRAY_JOB_ID="6", **array, **again)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "srun_words").read_text().splitlines()
    assert words[-2:] == ["--data", "abc"[task]]
    assert ("no task of this array measures c; --array=0-2 has one for each dataset" in done.stdout) == said


@pytest.mark.parametrize(
    "env, message",
    [
        ({"MMTARD_SRUN": "'x"}, "MMTARD_SRUN: ''x' is not a list of words: No closing quotation"),
        ({"MMTARD_PYTHON": "/gone/python"}, "/gone/python"),
    ],
)
def test_a_hook_that_cannot_be_used_is_one_line(body, tmp_path, env, message):
    done = body(
        "train_vitb32.sh", f"run_dir={tmp_path}/run", SLURM_RESTART_COUNT="x", MMTARD_SUBMITTED_AGAIN="-1", **env
    )
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "srun_words").exists()


def test_the_status_of_ranks_that_a_signal_ended_is_a_shells(body, tmp_path):
    script(tmp_path / "srun", "kill -9 $$")
    done = body("preflight.sh", "run_dir=x")
    assert done.returncode == 137


def test_each_task_of_the_teachers_trains_its_own(body, tmp_path):
    data = tmp_path / "s.tar"
    data.touch()
    for task, name in enumerate(("clean_vitl14", "pmg_aft2_vitl14")):
        words = (f"data.shards={data}", f"run_dir={tmp_path / name}")
        done = body("train_teachers.sh", *words, SLURM_ARRAY_TASK_ID=str(task))
        assert done.returncode == 0, done.stderr
        assert f"configs/teachers/{name}.yaml" in (tmp_path / "srun_words").read_text()


def test_the_body_of_a_job_needs_the_standard_library_alone():
    """The Python of a node outside the ranks' container may have no more."""
    check = (
        "import sys\n"
        "import mmtard.launch.batch\n"
        "outside = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'mmtard', '__main__'}\n"
        "print(sorted(outside & {'pydantic', 'yaml', 'submitit', 'torch', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


SCRIPTS = sorted(p.name for p in (ROOT / "slurm").glob("*.sh") if p.name != "local_cluster.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_its_comment_its_options_and_one_command(name):
    lines = (ROOT / "slurm" / name).read_text().replace("\\\n", "").splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert [line.split()[0] for line in code] == [".", "set", "exec"]


# ---------------------------------------------------------------- stored embeddings first


@pytest.fixture
def training(body, tmp_path, tree, write):
    """Call with the statuses of the ranks' starts: the commands that they were given, and the finished process."""
    tree["teachers"]["clean"]["stored"] = True
    config = write(tree)
    script(
        tmp_path / "srun",
        f'while [ "$1" != -m ]; do shift; done\necho "$3" >>{tmp_path}/ran\n'
        f'status=$(head -1 {tmp_path}/statuses); sed -i 1d {tmp_path}/statuses; exit "$status"',
    )

    def call(*statuses):
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        done = body("train_vitb32.sh", str(config))
        return (tmp_path / "ran").read_text().split(), done

    return call


def test_a_training_on_stored_embeddings_stores_those_that_are_missing_first(training, tmp_path):
    ran, done = training(0, 0)
    assert (ran, done.returncode) == (["cache", "train"], 0), done.stderr
    assert "stores the embeddings of clean first, once for every training on them" in done.stdout


def test_a_training_whose_embeddings_are_there_begins_at_once(training, tmp_path, tree):
    tree["teachers"]["clean"]["stored"] = True
    config = settings.validate(tree)
    store = Path(tree["data"]["shards"]) / "embeddings" / "x"
    store.mkdir(parents=True)
    manifest = {"identity": {}, "parts": {}, "samples": 1, "views": 1, "made_from": embedding_recipe(config, "clean")}
    (store / "manifest.json").write_text(json.dumps(manifest))
    ran, done = training(0)
    assert (ran, done.returncode) == (["train"], 0) and "stores" not in done.stdout


def test_a_storing_that_was_stopped_goes_back_to_the_queue_and_does_not_train(training):
    ran, done = training(75)
    assert (ran, done.returncode) == (["cache"], 75)
    assert "storing ended with status 75" in done.stdout and "goes back to the queue" in done.stdout


def test_a_storing_that_failed_ends_the_job(training):
    ran, done = training(2)
    assert (ran, done.returncode) == (["cache"], 2) and "queue" not in done.stdout
