import hashlib
import json
import os
import threading

import pytest
import torch
from saved_checkpoints import save, steps, tensors

from mmtard.errors import UserError
from mmtard.runs import checkpoints
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.runs.checkpoints import newest_valid, resolve


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5 and 10."""
    save(Checkpoints(tmp_path, keep_last=2), 5, 10)
    return tmp_path


def test_a_published_checkpoint_is_read_back_and_described_by_its_manifest(run):
    newest, passed_over = newest_valid(run)
    assert (newest, passed_over) == (run / "checkpoints" / "step-10", [])
    weights = checkpoints.read_weights(newest)
    assert weights.keys() == {"visual.proj", "visual.scale"} and torch.equal(
        weights["visual.proj"], torch.full((4, 3), 10.0)
    )
    assert torch.equal(checkpoints.read_optimizer(newest)["exp_avg.visual.proj"], torch.full((4, 3), -10.0))
    assert checkpoints.read_state(newest) == {"step": 10, "samples": 80}
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert (
        files.keys()
        == {"weights.safetensors", "optimizer.safetensors", "state.json"}
        == {p.name for p in newest.iterdir()} - {"manifest.json"}
    )
    for name, about in files.items():
        content = (newest / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_latest_points_at_the_newest(run):
    link = run / "checkpoints" / "latest"
    assert link.is_symlink() and os.readlink(link) == "step-10"
    save(Checkpoints(run, keep_last=2), 15)
    assert os.readlink(link) == "step-15" and {p.name for p in (run / "checkpoints").iterdir()} == {
        "latest",
        "step-10",
        "step-15",
    }


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


SPOILED = {
    "truncated": ("weights.safetensors", truncate, r"weights.safetensors has \d+ bytes, not \d+"),
    "one bit flipped": ("optimizer.safetensors", flip, "optimizer.safetensors does not match its checksum"),
    "state changed by hand": (
        "state.json",
        lambda p: p.write_text(p.read_text().replace("80", "90")),
        "state.json does not match its checksum",
    ),
    "a file missing": ("state.json", os.remove, "state.json is missing"),
    "no manifest": ("manifest.json", os.remove, "no manifest.json"),
    "half a manifest": ("manifest.json", truncate, "unreadable manifest.json"),
    "an empty manifest": ("manifest.json", lambda p: p.write_text("{}"), "unreadable manifest.json"),
    "another format": (
        "manifest.json",
        lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 2')),
        "format 2, this version reads 1",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_checkpoint_that_is_not_whole_is_passed_over_with_the_reason(run, how):
    name, spoil, words = SPOILED[how]
    spoil(run / "checkpoints" / "step-10" / name)
    newest, (why,) = newest_valid(run)
    assert newest.name == "step-5" and why.startswith("step-10: ")
    with pytest.raises(UserError, match=f"cannot be used: step-10: {words}"):
        resolve(run / "checkpoints" / "step-10")


def test_every_checkpoint_that_was_passed_over_is_told_newest_first(run):
    os.remove(run / "checkpoints" / "step-10" / "manifest.json")
    truncate(run / "checkpoints" / "step-5" / "state.json")
    newest, passed_over = newest_valid(run)
    assert newest is None and [why.split(":")[0] for why in passed_over] == ["step-10", "step-5"]
    with pytest.raises(UserError, match=r"usable weights \(step-10: .*; step-5: .*\); give one that is$"):
        resolve(run)


@pytest.mark.parametrize("at", [".", "checkpoints/step-10", "checkpoints/latest"])
def test_a_run_a_checkpoint_and_latest_resolve_to_run_and_checkpoint(run, at):
    assert resolve(run / at) == (run.resolve(), run.resolve() / "checkpoints" / "step-10")


@pytest.mark.parametrize("at", ["nowhere", "checkpoints"])
def test_another_folder_does_not_resolve(run, at):
    with pytest.raises(UserError, match="is no run, checkpoint or exported folder"):
        resolve(run / at)


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [(1, None, [6]), (2, None, [5, 6]), (1, 2, [2, 4, 6]), (2, 4, [4, 5, 6]), (9, None, [1, 2, 3, 4, 5, 6])],
)
def test_retention(tmp_path, keep_last, keep_every, kept):
    save(Checkpoints(tmp_path, keep_last, keep_every), 1, 2, 3, 4, 5, 6)
    assert steps(tmp_path) == kept


def test_a_write_that_was_interrupted_is_never_taken_and_cleaned(run):
    folder = run / "checkpoints"
    (folder / "step-10").rename(folder / ".writing-10-4711")  # whole, but not yet published
    assert newest_valid(run)[0].name == "step-5"
    Checkpoints(run, keep_last=2).clean()
    assert {p.name for p in folder.iterdir()} == {"step-5", "latest"}


def test_an_invalid_checkpoint_of_the_same_step_is_replaced(run):
    os.remove(run / "checkpoints" / "step-10" / "weights.safetensors")
    save(Checkpoints(run, keep_last=2), 10)
    assert newest_valid(run) == (run / "checkpoints" / "step-10", [])


def test_a_failed_write_publishes_nothing_is_told_once_and_the_next_one_succeeds(run, monkeypatch):
    def full(tensors, path, metadata=None):
        raise OSError(28, "No space left on device")

    saver = Checkpoints(run, keep_last=2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_tensors", full)
        saver.save(15, tensors(15), {}, {})
        with pytest.raises(UserError, match="No space left on device; free space or correct the folder"):
            saver.wait()
    assert newest_valid(run)[0].name == "step-10"
    saver.wait()
    save(saver, 15)
    assert newest_valid(run)[0].name == "step-15"


def test_a_folder_that_cannot_be_written_is_told_at_the_next_save(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    saver = Checkpoints(tmp_path, keep_last=1)
    saver.save(1, tensors(1), {}, {})
    with pytest.raises(UserError, match="checkpoint could not be written to '.*checkpoints'"):
        saver.save(2, tensors(2), {}, {})


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(tmp_path, monkeypatch):
    may_write, real = threading.Event(), checkpoints.save_tensors

    def slow(*args):
        assert may_write.wait(20)
        real(*args)

    monkeypatch.setattr(checkpoints, "save_tensors", slow)
    saver = Checkpoints(tmp_path, keep_last=5)
    saver.save(1, tensors(1), {}, {})
    assert steps(tmp_path) == []  # save came back before anything was published
    second = threading.Thread(target=saver.save, args=(2, tensors(2), {}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and steps(tmp_path) == []
    may_write.set()
    second.join(20)
    saver.wait()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_the_weights_are_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        checkpoints.save_tensors(tensors(1), tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == mode
