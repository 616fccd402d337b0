"""`mmtard cache` on two ranks: the same files as one rank makes, and stopped together."""

import ast
from pathlib import Path

import pytest

from mmtard import config as settings
from mmtard.distributed.interruption import Interruption
from mmtard.embeddings.build import cache

from .launch import run_ranks

pytestmark = pytest.mark.slow


def test_two_ranks_stop_together_go_on_and_make_the_files_of_one(job, tmp_path, ranks, monkeypatch):
    path, _ = job("cached")
    text = path.read_text().replace("flip: true", f"flip: false\n  embeddings: {tmp_path / 'two'}")
    path.write_text(text)
    printed = run_ranks([Path(__file__).with_name("store_twice.py"), path], 2, tmp_path, "ranks").splitlines()
    told = ast.literal_eval(next(line for line in printed if line.startswith("[")))
    assert [status for status, _ in told] == [75, 75]
    assert "; 2 of 3 missing parts of teacher clean are stored, start it again to go on" in told[0][1]
    assert any(": 1 of 3 parts are to be stored" in line for line in printed)

    said = []
    monkeypatch.setattr("mmtard.distributed.ranks.stop", lambda *_: None)
    alone = settings.load(path, [f"data.embeddings={tmp_path / 'one'}", "train.micro_batch_size=8"])
    cache(alone, Interruption(), said.append)
    for name in ("part-000000", "part-000001", "part-000002"):
        ours, theirs = (next((tmp_path / world).glob(f"*/{name}.safetensors")).read_bytes() for world in ("two", "one"))
        assert ours == theirs
    (folder,) = (tmp_path / "two").iterdir()
    cache(settings.load(path), Interruption(), said.append)
    assert said[-1] == f"teacher clean: all of its 150 x 1 embeddings are stored in {folder}, nothing to do"
