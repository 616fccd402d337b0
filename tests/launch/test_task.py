"""What a task makes of the end of mmtard, with a stand-in for mmtard and for Slurm's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtard.runs import history

ROOT = Path(__file__).parents[2]
CALL = """
import os, sys
from pathlib import Path
from mmtard.launch import task
for name in ("OTHERS_TURN_S", "SURVIVORS_TURN_S", "LOOK_EVERY_S"):
    setattr(task, name, float(os.environ.get(name, getattr(task, name))))
task.Task(tuple(sys.argv[2:]), Path(sys.argv[1]))()
"""
MMTARD = """
import os, signal, sys, time
if sys.argv[1:3] == ["config", "--may-start"] and sys.argv[4:] == ["x.yaml"]:
    open("asked", "a").write(sys.argv[3])
    raise SystemExit({may_not_start})
open("started", "a").write("x")
{body}
"""


@pytest.fixture
def task(tmp_path):
    """Call with what mmtard does, the job's state and whether the run may start again: the process of a task.

    It notes each `scontrol`, other than questions, in `requeued`.
    """
    (tmp_path / "mmtard").mkdir()
    (tmp_path / "mmtard" / "__init__.py").write_text(
        f"__path__.append({str(ROOT / 'mmtard')!r})"
    )  # all but __main__ is the real one
    shown = 'echo "JobId=7 JobState=$(cat state) Requeue=1"'
    scontrol = f'#!/bin/sh\ncase "$*" in "show job"*) {shown} ;; *) echo "$@" >>requeued ;; esac\n'
    for name, text in {"scontrol": scontrol, "squeue": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(body, state="RUNNING", words=("train", "x.yaml"), may_start=True, **env):
        (tmp_path / "state").write_text(state + "\n")
        (tmp_path / "mmtard" / "__main__.py").write_text(MMTARD.format(body=body, may_not_start=not may_start))
        own = {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_JOB_ID": "7",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        return subprocess.Popen(
            [sys.executable, "-c", CALL, tmp_path, *words],
            cwd=tmp_path,
            env=clean | own | env,
            stdout=-1,
            stderr=-2,
            text=True,
        )

    return start


def started(process, folder):
    """Wait until mmtard runs."""
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def requeued(folder):
    return (folder / "requeued").read_text() if (folder / "requeued").exists() else ""


@pytest.mark.parametrize(
    "body, status, printed",
    [
        ("", 0, ""),
        ("raise SystemExit(2)", 1, "RuntimeError: mmtard train ended with status 2; the lines above say why"),
        ("os.kill(os.getpid(), 9)", 1, "rank 0 was ended by SIGKILL"),
    ],
)
def test_a_run_that_ended_for_good_is_never_requeued(task, tmp_path, body, status, printed):
    process = task(body, may_start=False)
    assert printed in process.communicate(timeout=30)[0] and process.returncode == status
    assert requeued(tmp_path) == ""


@pytest.mark.parametrize(
    "env, job",
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"), ({"SLURM_RESTART_COUNT": "5"}, "7")],
)
def test_a_run_that_asks_for_another_start_is_requeued_by_its_own_name(task, tmp_path, env, job):
    process = task("raise SystemExit(75)", **env)
    assert f"job {job}: goes back to the queue" in process.communicate(timeout=30)[0] and process.returncode == 0
    assert requeued(tmp_path) == f"requeue {job}\n"


@pytest.mark.parametrize("words", [("train", "x.yaml"), ("evaluate", "run"), ("cache", "x.yaml")], ids=lambda w: w[0])
def test_work_whose_only_rank_was_killed_goes_back_to_the_queue(task, tmp_path, words):
    """By the kernel, say, for want of memory."""
    process = task("os.kill(os.getpid(), 9)", words=words)
    assert "job 7: goes back to the queue" in process.communicate(timeout=30)[0] and process.returncode == 0
    # A training may have been killed before its run was noted, for which it is not to blame.
    assert words[0] != "train" or (tmp_path / "asked").read_text() == "signalled"
    assert requeued(tmp_path) == "requeue 7\n"


def test_a_rank_that_was_killed_beside_one_that_failed_starts_nothing_again(task, tmp_path):
    (tmp_path / "7_1_ended_1").write_text("1")
    process = task("os.kill(os.getpid(), 9)", words=("evaluate", "run"), SLURM_NTASKS="2")
    assert "mmtard evaluate ended with status -9" in process.communicate(timeout=30)[0] and process.returncode == 1
    assert requeued(tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("end, asked", [("os.kill(os.getpid(), 9)", "signalled"), ("os.abort()", "again")])
def test_a_rank_that_waits_for_a_killed_one_is_ended_within_its_turn_and_the_job_goes_on(task, tmp_path, end, asked):
    """As inside a kernel of NCCL, where neither a closed connection nor a signal is noticed."""
    turns = {"SLURM_NTASKS": "2", "SURVIVORS_TURN_S": "1", "LOOK_EVERY_S": "0.5"}
    deaf = task("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", **turns)
    started(deaf, tmp_path)
    killed = task(end, SLURM_PROCID="1", **turns)
    printed = deaf.communicate(timeout=20)[0]
    assert "rank 0 still waits for a rank that is gone" in printed and deaf.returncode == 0
    assert killed.wait(20) == 0 and requeued(tmp_path) == "requeue 7\n"
    assert (tmp_path / "asked").read_text() == asked


@pytest.mark.slow
def test_a_run_whose_every_rank_was_ended_by_a_signal_is_requeued_once(task, tmp_path):
    """As NCCL's own watchdog ends those that wait for a lost one: none is left to decide."""
    ranks = [task("os.abort()", SLURM_NTASKS="2", SLURM_PROCID=rank, OTHERS_TURN_S="1") for rank in "01"]
    assert [rank.wait(30) for rank in ranks] == [0, 0]
    assert requeued(tmp_path) == "requeue 7\n"
    waits = task("os.abort()", SLURM_NTASKS="2", SLURM_RESTART_COUNT="1", OTHERS_TURN_S="100")
    with pytest.raises(subprocess.TimeoutExpired):  # for a rank that is still about to decide
        waits.wait(3)
    waits.kill()


def test_one_requeue_a_start_whatever_ranks_ask_for_it(task, tmp_path):
    for restarts in ("0", "0", "1"):
        task("raise SystemExit(75)", SLURM_RESTART_COUNT=restarts).communicate(timeout=30)
    assert requeued(tmp_path) == "requeue 7\n" * 2


def test_a_job_that_slurm_is_signalling_still_runs(task, tmp_path):
    task("raise SystemExit(75)", "SIGNALING").communicate(timeout=30)
    assert requeued(tmp_path) == "requeue 7\n"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_is_left_alone(task, tmp_path, state):
    process = task("raise SystemExit(75)", state)
    printed = process.communicate(timeout=30)[0]
    assert f"job 7: is {state}, and is not started again from here" in printed and process.returncode == 0
    assert requeued(tmp_path) == ""


WAITING = """\
8 afterok:7(unfulfilled),afterok:5(unfulfilled)
9 afterany:7(unfulfilled)
10 afterok:70(unfulfilled)
11 (null)
41 afterany:7(unfulfilled)
"""


@pytest.fixture
def forbidden(tmp_path, task):
    """Call with sbatch's answer (a number, or an error): Slurm refuses to requeue, and some jobs wait for job 7."""
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n[ $1 = update ] && echo $@ >>updated || { echo disabled >&2; exit 1; }\n"
    )
    (tmp_path / "waiting").write_text(WAITING)
    (tmp_path / "squeue").write_text(
        '#!/bin/sh\ncase "$*" in *%E*) cat waiting;; *--array*) cat tasks;; *) cat state;; esac\n'
    )
    (tmp_path / "7_submission.sh").write_text(
        "#!/bin/bash\n#SBATCH --output=%j_0_log.out\n#SBATCH --dependency=afterok:3\n"
    )
    (tmp_path / "7_submitted.pkl").write_text("the work")

    def answer(text, status=0):
        (tmp_path / "sbatch").write_text(
            '#!/bin/sh\necho "$@ $MMTARD_SUBMITTED_AGAIN $SLURM_JOB_ID" >>submitted; cat >text\n'
            f"echo {text} >&{1 + bool(status)}; exit {status}\n"
        )
        (tmp_path / "sbatch").chmod(0o755)

    return answer


def test_where_requeue_is_forbidden_one_other_job_goes_on_and_takes_over_those_that_wait(task, forbidden, tmp_path):
    forbidden("41")
    process = task("raise SystemExit(75)")
    assert "job 7: may not be requeued (disabled); submitted again as job 41" in process.communicate(timeout=30)[0]
    assert process.returncode == 75  # not 0: to whoever waits for job 7 to end well, its work is not done
    assert task("raise SystemExit(75)").wait(30) == 0  # another rank
    assert (tmp_path / "submitted").read_text() == "--parsable --dependency=afterany:7 --no-requeue 1 \n"
    assert "--output=7_0_log.out\n" in (tmp_path / "text").read_text() == (tmp_path / "41_submission.sh").read_text()
    assert (tmp_path / "41_submitted.pkl").read_text() == "the work"
    assert (
        tmp_path / "updated"
    ).read_text() == "update JobId=8 Dependency=afterok:41,afterok:5\nupdate JobId=9 Dependency=afterany:41\n"


def test_the_run_is_told_which_job_goes_on(task, forbidden, tmp_path):
    forbidden("41")
    (tmp_path / "run").mkdir()
    (tmp_path / "x.yaml").write_text(
        f"{{run_dir: {tmp_path}/run, student: {{weights: openai}}, method: {{name: tecoa}}, data: {{shards: s}}, "
        "train: {steps: 9, batch_size: 64}}"
    )
    task("raise SystemExit(75)").wait(30)
    assert (tmp_path / "run" / "goes_on_as").read_text() == "7 41\n"
    assert (
        history.current_job(tmp_path / "run", {"job": "7"}) == "41"
        and history.current_job(tmp_path / "run", {"job": "50"}) == "50"
    )


def test_a_task_of_an_array_goes_on_alone(task, forbidden, tmp_path):
    (tmp_path / "7_submitted.pkl").rename(tmp_path / "7_2_submitted.pkl")
    (tmp_path / "7_submission.sh").write_text("#SBATCH --output=%A_%a_0_log.out\n")
    (tmp_path / "waiting").write_text("8 afterok:7_*(unfulfilled)\n9 afterok:7_2(unfulfilled)\n")
    (tmp_path / "tasks").write_text("7_0 COMPLETED\n7_1 RUNNING\n7_2 RUNNING\n7_3 PENDING\n")
    forbidden("41")
    task(
        "raise SystemExit(75)", "RUNNING", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2", MMTARD_SUBMITTED_AGAIN="4"
    ).wait(30)
    assert (tmp_path / "submitted").read_text() == "--parsable --dependency=afterany:7_2 --no-requeue --array=2 5 \n"
    assert (tmp_path / "text").read_text() == "#SBATCH --output=7_2_0_log.out\n" and (
        tmp_path / "41_2_submitted.pkl"
    ).is_file()
    assert (
        tmp_path / "updated"
    ).read_text() == "update JobId=8 Dependency=afterok:7_1:7_3:41_2\nupdate JobId=9 Dependency=afterok:41_2\n"


def test_a_job_that_can_go_on_in_no_way_fails_with_both_reasons(task, forbidden):
    forbidden("'sbatch: error: closed'", 1)
    process = task("raise SystemExit(75)")
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    reasons = "job 7 could neither go back to the queue (disabled) nor be submitted again (sbatch: error: closed)"
    assert f"{reasons}; submit it again to go on from what is saved" in printed


def test_an_evaluation_is_requeued_twenty_times_at_most(task, tmp_path):
    for restarts, status in ((19, 0), (20, 1)):
        process = task("raise SystemExit(75)", words=("evaluate", "run"), SLURM_RESTART_COUNT=str(restarts))
        printed = process.communicate(timeout=30)[0]
        assert process.returncode == status
    assert "mmtard evaluate was stopped 21 times; submit it again, with more --time, to go on" in printed
    assert requeued(tmp_path) == "requeue 7\n"


LISTENS_LATE = """
time.sleep(1)
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
time.sleep(20)
"""


@pytest.mark.slow
def test_a_signal_that_comes_before_mmtard_listens_is_neither_lost_nor_its_end(task, tmp_path):
    process = task(LISTENS_LATE)
    started(process, tmp_path)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, int(child)):  # Slurm signals every process of a step
        os.kill(pid, signal.SIGUSR2)
    assert "goes back to the queue" in process.communicate(timeout=15)[0]


@pytest.mark.slow
def test_a_signal_to_a_run_that_has_ended_changes_nothing(task, tmp_path):
    process = task("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1.5)")
    started(process, tmp_path)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 0 and requeued(tmp_path) == ""


@pytest.mark.slow
def test_a_person_who_interrupts_a_job_ends_it_once_and_for_good(task, tmp_path):
    """`scancel --signal=INT`, which reaches both the task and mmtard: a second SIGINT would end mmtard unsaved."""
    body = "signal.signal(signal.SIGINT, lambda *_: open('heard', 'a').write('x')); open('ready', 'w').close()\n"
    body += "time.sleep(2.5); sys.exit(75)"
    for words, why in {("train", "x.yaml"): "status 75", ("evaluate", "run"): "status 75"}.items():
        for name in ("heard", "ready", "started"):
            (tmp_path / name).unlink(missing_ok=True)
        process = task(body, words=words, may_start=False, SLURM_RESTART_COUNT=str(len(words[1])))
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, int(child)):
            os.kill(pid, signal.SIGINT)
        assert why in process.communicate(timeout=20)[0] and process.returncode == 1
        assert (tmp_path / "heard").read_text() == "x" and requeued(tmp_path) == ""


@pytest.mark.slow
def test_an_interrupt_that_comes_before_mmtard_listens_reaches_it(task, tmp_path):
    process = task(LISTENS_LATE.replace("SIGUSR2", "SIGINT"), may_start=False)
    started(process, tmp_path)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, int(child)):
        os.kill(pid, signal.SIGINT)
    assert "ended with status 75" in process.communicate(timeout=15)[0] and requeued(tmp_path) == ""
