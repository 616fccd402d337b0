"""The processes of a study that take one work after another."""

import sys

import pytest

from mmtard.distributed.processes import RANK_VARIABLES
from mmtard.study import team

WORKER = """#!{python}
import json, os, sys
answers = os.fdopen(int(sys.argv[-1]), "w", buffering=1)
for line in sys.stdin:
    work = json.loads(line)
    message = os.environ.get(work["asks"], "") if "asks" in work else str(os.getpid())
    answers.write(json.dumps({{"status": work["fails"], "message": message}}) + "\\n")
"""


@pytest.fixture
def one(tmp_path, monkeypatch):
    """A team of one, whose process answers with its number, or with a variable of its environment."""
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr(team.sys, "executable", str(worker))
    one = team.Team(tmp_path / "study.yaml", ranks=1, threads=1)
    yield one
    one.end(5)


def test_after_a_work_that_failed_the_next_one_has_processes_of_its_own(one):
    """A failed training leaves its ranks' group open, whose meeting place is gone: the next work would wait in it."""
    status, failed = one.ask({"fails": 3})
    assert status == 3 and not one.members
    assert one.ask({"fails": 0}) == (0, "")
    [member] = one.members
    assert str(member.process.pid) != failed
    assert one.ask({"fails": 0}) == (0, "") and one.members == [member], "what went well goes on"


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_a_process_alone_is_no_rank_of_what_started_the_study(name, one, monkeypatch):
    monkeypatch.setenv(name, "7")
    assert one.ask({"fails": 4, "asks": name}) == (4, "")
