"""The processes of a study that take one work after another."""

import sys

from mmtard.study import team

WORKER = """#!{python}
import json, os, sys
answers = os.fdopen(int(sys.argv[-1]), "w", buffering=1)
for line in sys.stdin:
    status = json.loads(line)["fails"]
    answers.write(json.dumps({{"status": status, "message": str(os.getpid())}}) + "\\n")
"""


def test_after_a_work_that_failed_the_next_one_has_processes_of_its_own(tmp_path, monkeypatch):
    """A failed training leaves its ranks' group open, whose meeting place is gone: the next work would wait in it."""
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(python=sys.executable))
    worker.chmod(0o755)
    monkeypatch.setattr(team.sys, "executable", str(worker))
    one = team.Team(tmp_path / "study.yaml", ranks=1, threads=1)
    try:
        status, failed = one.ask({"fails": 3})
        assert status == 3 and not one.members
        assert one.ask({"fails": 0}) == (0, "")
        [member] = one.members
        assert str(member.process.pid) != failed
        assert one.ask({"fails": 0}) == (0, "") and one.members == [member], "what went well goes on"
    finally:
        one.end(5)
