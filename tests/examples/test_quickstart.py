"""The quickstart as a program."""

import os
import sys

from mmtard.errors import UserError
from mmtard.examples import quickstart


def test_it_goes_on_without_a_reader(monkeypatch):
    """`mmtard quickstart | head` trained nothing more once head had its lines."""
    done = []

    def run_here(*_):
        print("x" * 99_999, flush=True)
        done.append("what comes after a line that nobody reads")
        raise UserError("that is all")

    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(quickstart.run, "run_here", run_here)
    assert quickstart.main() == 2 and done
