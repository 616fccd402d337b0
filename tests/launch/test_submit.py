"""The command line of launch/submit.py where there is neither torch nor Slurm."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from published_checkpoints import publish

from mmtard import config as settings
from mmtard.embeddings.settings import embedding_recipe, embeddings_folder

HERE = Path(__file__).parent


def test_the_dry_run_prints_the_exact_script_and_settings_and_writes_nothing(submit, plain, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    shape = ("--nodes", "2", "--gpus-per-node", "2", "--time", "1-12:30:00")
    place = ("--partition", "gpu", "--account=ours", "--reservation", "week 7", "--slurm", "mail-type=END")
    done = submit(*shape, "train.lr=1e-3", "--dry-run", *place, "attack.eps=3/255")
    assert (done.returncode, done.stderr) == (0, "")
    head, configuration = re.match(r"(.*# ---- .*?\n)(.*)", done.stdout, re.DOTALL).groups()
    assert plain(head) == (HERE / "dry_run.txt").read_text()
    monkeypatch.chdir(tmp_path)
    assert configuration == settings.dump(settings.load("run.yaml", ["train.lr=1e-3", "attack.eps=3/255"]))
    assert sorted(tmp_path.rglob("*")) == before


WRONG = [  # arguments, what the one line on stderr says
    (["train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"),
    (["your_data"], "'your_data' is not of the form key.sub=value; name a configuration with --config your_data"),
    (["attack.eps=2/0"], "'2/0' is not a fraction; write it as 2/255 or 0.0078"),
    (["data.shards=gone.tar"], "missing shard 'gone.tar'"),
    (["--nodes", "3"], "4 lanes cannot be shared by 24 ranks"),
    (["train.lr=1e-5,2e-5"], "(for one run of each value: --sweep train.lr=1e-5,2e-5)"),
    (["--sweep", "train.lr="], "'train.lr=' is not of the form key.sub=value,value"),
    (["--sweep", "train.lr=1e-5,"], "is not of the form"),
    (["--sweep", "seeds=0,1,0"], "two runs would share the folder"),
    (["--sweep", "run_dir=runs/a/b,runs/a_b"], "'runs/a/b' and 'runs/a_b' would both be kept as 'runs_a_b'"),
    (["--evaluate", "a/b", "--evaluate", "a_b"], "--evaluate: 'a/b' and 'a_b' would both be kept as 'a_b'; name them"),
    (["--sweep", "train.batch_size=8,9"], "4 lanes do not divide train.batch_size 9"),
    (["--evaluate", "nowhere.tar"], "--evaluate: data.shards: missing shard 'nowhere.tar'"),
    (["--mem", "lots"], "--mem: 'lots' is not an amount of memory; write MB, or a unit of K, M, G or T: 200G"),
    (["--mem", "1.5T"], "--mem: '1.5T' is not an amount of memory"),
    (["--mem="], "--mem: '' is not an amount of memory"),
    (["--at-once", "2"], "--at-once: says how many runs of a --sweep go side by side; add one, or leave --at-once out"),
    (["--time", "tomorrow"], "--time: 'tomorrow' is not a time limit; write minutes, H:MM:SS or D-HH:MM:SS"),
    (["--time", "0"], "--time: '0' is not a time limit"),
    (["--time", "2"], "--signal-lead: a warning 120 s ahead needs more than the 2 min of --time 2"),
    (["--nodes", "0"], "argument --nodes: '0' is not a whole number of at least 1"),
    (["--node", "2"], "unrecognized arguments: --node"),
    (["--local", "--dry-run"], "not allowed with"),
    (["--slurm", "nodes=3"], "--slurm: 'nodes' is set by --nodes"),
    (["--slurm", "open-mode=truncate"], "leave it out"),
    (["--slurm", "mail-type="], "'mail-type=' is not of the form key=value"),
    (["--slurm", "x; touch y=1"], "--slurm: 'x; touch y' is no flag of sbatch"),
    (["--job-name=x\n#SBATCH --uid=0"], "holds the control character '\\n'; take it out"),
    (["--partition", "x\rtouch y"], "holds the control character '\\r'; take it out"),
    (["--slurm", "comment=x\ntouch y"], "holds the control character '\\n'; take it out"),
    (["--account=x\u2028"], "holds the control character '\\u2028'; take it out"),
    (['run_dir="a\\nb"'], "holds the control character '\\n'"),
    (["run_dir=100%job"], "/100%job' holds '%', which Slurm takes for a pattern"),
    (["run_dir=a\\b"], "pattern in the path of a log; choose a folder without it"),
    (["--setup", "gone.sh"], "--setup: 'gone.sh' is no file; give the shell lines that the job begins with"),
    (["--srun", "'x"], "--srun: ''x' is not a list of words: No closing quotation"),
]


@pytest.mark.parametrize("words, told", WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_a_wrong_command_line_is_answered_with_one_line(submit, tmp_path, words, told):
    gpus = [] if "--nodes" in words else ["--gpus-per-node", "4"]
    done = submit(*gpus, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("submit.py: ") and done.stderr.count("\n") == 1 and told in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_without_slurm_it_names_the_ways_that_need_none(submit, tmp_path):
    done = submit("--gpus-per-node", "4")
    assert done.returncode == 2
    ways = "--local runs it on this machine, --dry-run shows what would be submitted"
    assert done.stderr == f"submit.py: no Slurm here (sbatch is not on the PATH); {ways}\n"
    assert not list(tmp_path.glob("run/submissions/*"))


def test_what_sbatch_objects_to_is_passed_on(submit, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpuu' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    done = submit("--gpus-per-node", "4", "--partition", "gpuu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "sbatch refused the job: sbatch: error: invalid partition specified: gpuu; correct the flag" in done.stderr
    assert not list(tmp_path.glob("run/submissions/*"))


def test_a_node_that_no_partition_has_is_told_by_its_gpus_and_cores(submit, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    refusal = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    sbatch.write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    done = submit("--gpus-per-node", "4", "--cpus-per-task", "24")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "no node has 4 GPUs and 96 cores; lower --gpus-per-node or --cpus-per-task, or name a --partition"
        in done.stderr
    )


def test_a_submission_keeps_the_code_the_settings_and_where_they_came_from(submit, tmp_path):
    """What sbatch is handed, by one that only notes it."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\nread -r line <"$1"\necho "$SLURM_NTASKS" >asked\necho "Submitted batch job 41"\n')
    sbatch.chmod(0o755)
    done = submit("--gpus-per-node", "4", "train.lr=1e-3", SLURM_NTASKS="7")
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = (tmp_path / "run" / "submissions").iterdir()
    assert (
        f"job 41: training, run folder {tmp_path / 'run'}\n  log of rank 0: {folder}/jobs/41_0_log.out" in done.stdout
    )
    assert "watch: squeue --jobs 41" in done.stdout and f"tail -F {folder}/jobs/41_0_log.out" in done.stdout
    code = folder / "code"
    assert (code / "mmtard" / "training" / "train.py").is_file() and (code / "mmtard" / "launch" / "task.py").is_file()
    assert not list(folder.rglob("__pycache__"))
    (stored,) = folder.glob("*.yaml")
    assert yaml.safe_load(stored.read_text())["train"]["lr"] == 1e-3
    assert json.loads((folder / "submission.json").read_text())["command"][-1] == "train.lr=1e-3"
    assert (tmp_path / "asked").read_text() == "\n"  # the shape of a job that this was called in does not leak


def test_a_python_without_torch_needs_another_for_the_jobs(submit, tmp_path):
    """A site without torch, which a poisoned one is not."""
    (tmp_path / "no_torch.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
    )
    (tmp_path / "poison" / "sitecustomize.py").write_text((tmp_path / "no_torch.py").read_text())
    done = submit("--gpus-per-node", "4")
    assert (
        done.returncode == 2
        and f"'{sys.executable}' has no torch; name the Python of the jobs with --python" in done.stderr
    )
    assert "no Slurm here" in submit("--gpus-per-node", "4", "--python", "/opt/torch/bin/python").stderr


# ---------------------------------------------------------------- sweeps


def test_a_sweep_is_an_array_with_a_run_folder_for_each_combination(submit, tmp_path):
    done = submit(
        "--gpus-per-node",
        "4",
        "--array",
        "seeds=0,1",
        "--sweep",
        "attack.eps=2/255,4/255",
        "--at-once",
        "3",
        "--dry-run",
        "log.every=5",
    )
    assert "#SBATCH --array=0-3%3\n" in done.stdout and "%A_%a_0_log.out\n" in done.stdout
    assert re.findall(r"# ---- array task (\d):", done.stdout) == ["0", "1", "2", "3"]
    found = [yaml.safe_load(part.split("\n", 1)[1]) for part in done.stdout.split("# ---- ")[1:]]
    assert [(Path(s["run_dir"]).name, s["seed"], s["attack"]["eps"]) for s in found] == [
        ("seed=0_attack.eps=2_255", 0, "2/255"),
        ("seed=0_attack.eps=4_255", 0, "4/255"),
        ("seed=1_attack.eps=2_255", 1, "2/255"),
        ("seed=1_attack.eps=4_255", 1, "4/255"),
    ]
    assert all(Path(s["run_dir"]).parent == tmp_path / "run" and s["log"]["every"] == 5 for s in found)


@pytest.mark.parametrize(
    "sweep, values",
    [
        ("train.betas=[0.9,0.99],[0.9,0.999]", ["[0.9,0.99]", "[0.9,0.999]"]),
        ("data.shards=a/{0..1}.tar,b/{0,1}.tar", ["a/{0..1}.tar", "b/{0,1}.tar"]),
        ("method={name: clean},{name: tecoa}", ["{name: clean}", "{name: tecoa}"]),
        ("x='a,b',\"c,'d\"", ["'a,b'", '"c,\'d"']),
        ("x='a [b','c}'", ["'a [b'", "'c}'"]),
        ("x=1", ["1"]),
    ],
)
def test_a_sweep_is_split_at_the_commas_between_its_values(sweep, values):
    from mmtard.launch.plan import _axis

    assert _axis(sweep) == (sweep.partition("=")[0], values)


@pytest.mark.parametrize(
    "time, minutes",
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("24:00:00", 1440),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("0-00:00:01", 1),
        ("7-00:00:00", 10080),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time, minutes):
    from mmtard.launch import request

    assert request.minutes(time) == minutes


@pytest.mark.parametrize("size", ["0", "64000", "200G", "2t", "200GB", "16gb"])
def test_an_amount_of_memory_is_given_to_slurm_as_it_is_written(submit, size):
    assert f"#SBATCH --mem={size}\n" in submit("--gpus-per-node", "4", "--mem", size, "--dry-run").stdout


# ---------------------------------------------------------------- pipeline


@pytest.fixture
def teachers(tmp_path, tree, write):
    """Configurations of the two teachers of run.yaml, in teachers/ beside it; the clean one's run is complete."""
    (tmp_path / "teachers").mkdir()
    for name, method in (("clean", "clean"), ("robust", "tecoa")):
        run = tmp_path / "runs" / name
        tree["teachers"][name]["weights"] = str(run)
        own = {
            **tree,
            "run_dir": str(run),
            "teachers": {},
            "method": {"name": method},
            "data": {**tree["data"], "lanes": 8},
            "train": {"steps": 20, "batch_size": 8},
        }
        write(own, f"teachers/{name}.yaml")
    write(tree)
    done(tmp_path / "runs" / "clean", 20)
    return tmp_path / "runs"


def done(run, step):
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return publish(run, step)


def stages(printed):
    """[(title, job name, dependency)] of a dry run."""
    found = []
    for part in printed.split("# ==== ")[1:]:
        wait = re.search(r"--dependency=(\S+)", part)
        found.append((part.partition(":")[0], re.search(r"--job-name=(\S+)", part)[1], wait and wait[1]))
    return found


def test_the_pipeline_skips_a_teacher_that_is_complete(submit, teachers, tmp_path):
    (tmp_path / "val.tar").touch()
    printed = submit(
        "--gpus-per-node", "4", "--pipeline", "--evaluate", str(tmp_path / "val.tar"), "--dry-run", "--nodes", "1"
    ).stdout
    assert f"# teacher clean is complete: {teachers / 'clean'}\n" in printed
    assert stages(printed) == [
        ("teacher robust", "mmtard-robust", None),
        ("training", "mmtard-run", "afterok:JOB_OF_mmtard-robust"),
        ("evaluation", "mmtard-evaluate-run", "afterok:JOB_OF_mmtard-run"),
    ]
    assert printed.count("#SBATCH --kill-on-invalid-dep=yes\n") == 2
    words = f"evaluate {tmp_path}/run --data {tmp_path}/val.tar --device auto --out {tmp_path}/run/evaluations/"
    assert f"python -m mmtard {words}" in printed


def test_the_pipeline_goes_on_where_it_stands(submit, teachers, tmp_path):
    done(teachers / "robust", 19)
    assert [s[0] for s in stages(submit("--gpus-per-node", "4", "--pipeline", "--dry-run").stdout)] == [
        "teacher robust",
        "training",
    ]
    done(teachers / "robust", 20)
    assert stages(submit("--gpus-per-node", "4", "--pipeline", "--dry-run").stdout) == [
        ("training", "mmtard-run", None)
    ]
    done(tmp_path / "run", 10)
    printed = submit("--gpus-per-node", "4", "--pipeline")
    assert printed.returncode == 0 and printed.stdout.endswith("# nothing is left to do\n")
    assert [
        s[0] for s in stages(submit("--gpus-per-node", "4", "--pipeline", "--dry-run", "train.steps=11").stdout)
    ] == ["training"]


def test_a_teacher_whose_last_checkpoint_is_damaged_is_not_complete(submit, teachers, tmp_path):
    publish(teachers / "robust", 10)
    (publish(teachers / "robust", 20) / "weights.safetensors").write_bytes(b"tens")
    words = ("--gpus-per-node", "4", "--pipeline", "--dry-run")
    assert [title for title, *_ in stages(submit(*words).stdout)] == ["teacher robust", "training"]


def stored(tmp_path, overrides=()):
    """A finished store of the clean teacher's embeddings, as its manifest tells it."""
    config = settings.load(tmp_path / "run.yaml", ["teachers.clean.stored=true", *overrides])
    folder = embeddings_folder(config.data) / "0123456789abcdef"
    folder.mkdir(parents=True)
    told = {"identity": {}, "made_from": embedding_recipe(config, "clean"), "samples": 1, "views": 1, "parts": {}}
    (folder / "manifest.json").write_text(json.dumps(told))
    return folder


def test_the_pipeline_stores_embeddings_between_teachers_and_student(submit, teachers, tmp_path):
    words = ("--gpus-per-node", "4", "--pipeline", "--dry-run", "teachers.clean.stored=true")
    printed = submit(*words).stdout
    assert stages(printed) == [
        ("teacher robust", "mmtard-robust", None),
        ("stored embeddings", "mmtard-cache-run", "afterok:JOB_OF_mmtard-robust"),
        ("training", "mmtard-run", "afterok:JOB_OF_mmtard-robust:JOB_OF_mmtard-cache-run"),
    ]
    every = submit(*words, "--evaluate", "run.yaml", "--job-name", "mine").stdout
    assert stages(every)[2:] == [
        ("training", "mine", "afterok:JOB_OF_mmtard-robust:JOB_OF_mmtard-cache-run"),
        ("evaluation", "mine", "afterok:JOB_OF_mmtard-run"),
    ]
    assert re.search(r"python -m mmtard cache \S+/run/submissions/\S+_run.yaml\n", printed)
    folder = stored(tmp_path)
    printed = submit(*words).stdout
    assert [s[0] for s in stages(printed)] == [
        "teacher robust",
        "training",
    ] and f"# embeddings of teacher clean are stored: {folder}\n" in printed


def test_embeddings_of_other_settings_or_of_a_teacher_still_in_training_are_stored_anew(submit, teachers, tmp_path):
    stored(tmp_path)
    words = ("--gpus-per-node", "4", "--pipeline", "--dry-run", "teachers.clean.stored=true")
    assert "stored embeddings" in [s[0] for s in stages(submit(*words, "data.resize=256").stdout)]
    done(teachers / "clean", 19)
    assert [s[0] for s in stages(submit(*words).stdout)] == [
        "teacher clean",
        "teacher robust",
        "stored embeddings",
        "training",
    ]


def test_a_sweep_shares_the_embeddings_that_its_points_agree_in(submit, teachers):
    words = (
        "--gpus-per-node",
        "4",
        "--pipeline",
        "--dry-run",
        "teachers.clean.stored=true",
        "data.flip=true",
        "data.views=2",
    )
    assert submit(*words, "--sweep", "train.lr=1e-5,2e-5").stdout.count("python -m mmtard cache") == 1
    assert submit(*words, "--sweep", "data.views=2,3").stdout.count("python -m mmtard cache") == 2


def test_missing_embeddings_are_stored_first_without_a_pipeline_too(submit, teachers, tmp_path):
    done(teachers / "robust", 20)
    words = ("--gpus-per-node", "4", "--dry-run", "teachers.clean.stored=true")
    assert stages(submit(*words).stdout) == [
        ("stored embeddings", "mmtard-cache-run", None),
        ("training", "mmtard-run", "afterok:JOB_OF_mmtard-cache-run"),
    ]
    stored(tmp_path)
    assert stages(submit(*words).stdout) == [("training", "mmtard-run", None)]


def test_without_pipeline_a_missing_teacher_is_pointed_out(submit, teachers):
    printed = submit("--gpus-per-node", "4", "--dry-run").stdout
    assert f"# teacher robust: {teachers / 'robust'} holds no checkpoint yet; --pipeline trains it first\n" in printed
    assert [s[0] for s in stages(printed)] == ["training"]


def test_a_dry_run_ends_with_what_the_same_command_is_refused_for(submit, teachers):
    words = ("--gpus-per-node", "4")
    refusal = submit(*words).stderr.removeprefix("submit.py: ")
    assert "--pipeline trains it first, or --slurm dependency=" in refusal
    dry = submit(*words, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.endswith(f"\n# without --dry-run, submit refuses this: {refusal}")
    for remedy in (("--pipeline",), ("--slurm", "dependency=afterok:1")):
        assert "refuses this" not in submit(*words, "--dry-run", *remedy).stdout


def test_a_student_is_not_queued_to_fail_for_want_of_a_teacher(submit, teachers, tmp_path):
    refused = submit("--gpus-per-node", "4")
    assert refused.returncode == 2 and not (tmp_path / "run" / "submissions").exists()
    assert "robust holds no checkpoint yet; --pipeline trains it first, or --slurm dependency=" in refused.stderr
    waits = submit("--gpus-per-node", "4", "--slurm", "dependency=afterok:1")
    assert waits.stderr.startswith("submit.py: no Slurm here")


def test_in_a_pipeline_the_place_of_the_data_is_everybodys_and_the_rest_the_students(submit, teachers, tmp_path):
    (tmp_path / "other.tar").touch()
    printed = submit(
        "--gpus-per-node",
        "4",
        "--pipeline",
        "--dry-run",
        "data.shards=other.tar",
        "train.lr=1e-3",
        "data.window=8",
        "--slurm",
        "dependency=afterany:7",
    ).stdout
    teacher, student = (
        yaml.safe_load(part.split("\n", 1)[1])
        for part in re.split(r"\n# ==== ", printed.replace("# ---- ", "\n# ==== "))[2::2]
    )
    assert teacher["data"]["shards"] == student["data"]["shards"] == "other.tar"
    assert (teacher["train"]["lr"], student["train"]["lr"]) == (2e-5, 1e-3) and (
        teacher["data"]["window"],
        student["data"]["window"],
    ) == (1024, 8)
    assert [s[2] for s in stages(printed)] == ["afterany:7", "afterany:7,afterok:JOB_OF_mmtard-robust"]


def test_a_stage_that_cannot_run_is_named(submit, teachers):
    done = submit("--nodes", "4", "--gpus-per-node", "1", "--pipeline", "teachers.robust.arch=x")
    assert "no Slurm here" in done.stderr


@pytest.mark.parametrize(
    "nodes, limit", [("3", "cannot be shared by 3 ranks"), ("16", "allows at most 8 ranks, not 16")]
)
def test_a_teacher_whose_batch_the_ranks_cannot_share_is_to_be_trained_on_fewer(submit, teachers, nodes, limit):
    done = submit("--nodes", nodes, "--gpus-per-node", "1", "--pipeline", "data.lanes=48", "train.batch_size=48")
    remedy = "train this teacher without --pipeline on fewer GPUs (a number that divides 8), then submit the student"
    assert (done.returncode, done.stderr) == (2, f"submit.py: teacher robust: its batch of 8 {limit}; {remedy}\n")


def test_a_teacher_whose_lanes_alone_are_too_few_is_told_to_have_more(submit, teachers, tmp_path):
    file = tmp_path / "teachers" / "robust.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"train": {"steps": 20, "batch_size": 48}}))
    done = submit("--nodes", "3", "--gpus-per-node", "1", "--pipeline")
    told = "teacher robust: data.lanes: 8 lanes cannot be shared by 3 ranks; make it a multiple of 3"
    assert done.stderr == f"submit.py: {told}\n"


def test_requeueing_can_be_left_out_where_it_is_forbidden(submit):
    printed = submit("--gpus-per-node", "4", "--dry-run", "--slurm", "no-requeue").stdout
    assert "#SBATCH --no-requeue\n" in printed and "#SBATCH --requeue" not in printed


def test_the_dry_run_can_be_cut_short(submit, tmp_path):
    command = (
        f"{sys.executable} {HERE.parents[1]}/launch/submit.py --config run.yaml --gpus-per-node 4 --dry-run | head -n 1"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("# dry run: nothing is written or submitted\n", "")
