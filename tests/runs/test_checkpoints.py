import errno
import hashlib
import json
import os
import shutil
import threading

import pytest
import torch
from saved_checkpoints import save, steps, tensors

from mmtard.errors import UserError
from mmtard.runs import checkpoints
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.runs.checkpoints import newest_valid, resolve
from mmtard.runs.checksums import describe
from mmtard.runs.journal import Journal


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


def test_a_run_read_at_an_older_checkpoint_than_its_newest_says_so_once(run, capsys):
    truncate(run / "checkpoints" / "step-10" / "weights.safetensors")
    assert resolve(run)[1].name == resolve(run)[1].name == "step-5"
    line = (
        f"WARN {run.resolve()}: a newer checkpoint is not whole, and step-5 is taken: step-10: weights.safetensors has"
    )
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == 1


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


@pytest.mark.parametrize("saves", [True, False])
def test_a_damaged_checkpoint_beyond_where_the_run_goes_on_removes_none_that_is_whole(tmp_path, saves):
    save(Checkpoints(tmp_path, 2), 9, 10)
    (tmp_path / "checkpoints" / "step-10" / "weights.safetensors").write_bytes(b"")
    saver = Checkpoints(tmp_path, keep_last=1)
    if saves:
        save(saver, 9)
    saver.delete_old()
    assert newest_valid(tmp_path)[0].name == "step-9"


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


@pytest.mark.parametrize("made", ["a folder", "a file", "a dangling link", "a link elsewhere"])
def test_a_copy_that_kept_no_links_goes_on(run, made, tmp_path):
    """`cp -rL`, `rsync -L`, an object store, a share without links."""
    link = run / "checkpoints" / "latest"
    link.unlink()
    if made == "a folder":
        shutil.copytree(run / "checkpoints" / "step-10", link)
    elif made == "a file":
        link.write_text("step-10\n")
    else:
        link.symlink_to("step-99" if made == "a dangling link" else "/etc")
    if made.startswith("a f"):
        assert checkpoints.read_state(resolve(link)[1])["step"] == 10
    save(Checkpoints(run, keep_last=2), 15)
    assert os.readlink(link) == "step-15" and steps(run) == [10, 15]


def test_a_folder_of_the_users_own_in_the_place_of_latest_is_not_removed(run):
    link = run / "checkpoints" / "latest"
    link.unlink()
    link.mkdir()
    (link / "mine.pt").write_text("x")
    saver = Checkpoints(run, keep_last=2)
    saver.save(15, tensors(15), {}, {"step": 15})
    with pytest.raises(UserError, match="latest' is a folder with other files than a checkpoint's; move it away"):
        saver.wait()
    assert (link / "mine.pt").exists()


def test_a_file_system_without_links_gets_a_file_that_names_the_checkpoint(run, monkeypatch):
    def none(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(type(run), "symlink_to", none)
    saver = Checkpoints(run, keep_last=1)
    save(saver, 15)
    saver.keep_most_robust(15, 15)
    save(saver, 20)
    assert steps(run) == [15, 20] and resolve(run / "checkpoints" / "latest")[1].name == "step-20"


def test_links_that_someone_planted_are_removed_and_never_followed(run, tmp_path_factory):
    victim = tmp_path_factory.mktemp("victim")
    (victim / "precious").write_text("x")
    for name in (".retired-5", ".writing-15-1", f".writing-15-{os.getpid()}", f".latest-{os.getpid()}"):
        (run / "checkpoints" / name).symlink_to(victim)
    saver = Checkpoints(run, keep_last=1)
    saver.clean()
    (run / "checkpoints" / ".retired-10").symlink_to(victim)
    save(saver, 15)
    assert [p.name for p in victim.iterdir()] == ["precious"] and steps(run) == [15]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"latest", "step-15"}


@pytest.mark.parametrize("keep_last, left", [(1, [10]), (2, [10]), (3, [5, 10])])
def test_a_short_disk_gets_room_before_the_write_and_a_whole_checkpoint_stays(run, monkeypatch, keep_last, left):
    """With room for none: what would go after the write goes before it, and one line says what is needed."""
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    saver = Checkpoints(run, keep_last)
    saver.save(15, tensors(15), {}, {"step": 15})
    with pytest.raises(
        UserError, match=r"No space left on device; free .* \(the disk at '.*' has 1.0 KiB free, a checkp"
    ):
        saver.wait()
    assert steps(run) == left and {p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")} == set()


def test_room_is_made_and_used_where_the_disk_holds_only_what_is_kept(run, monkeypatch):
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30 if steps(run) == [10] else 1000))
    save(Checkpoints(run, keep_last=2), 15)
    assert steps(run) == [10, 15]


def test_the_only_whole_checkpoint_never_makes_room(run, monkeypatch):
    os.remove(run / "checkpoints" / "step-10" / "manifest.json")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    saver = Checkpoints(run, keep_last=1)
    saver.save(15, tensors(15), {}, {"step": 15})
    with pytest.raises(UserError, match="No space left"):
        saver.wait()
    assert newest_valid(run)[0].name == "step-5"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(run, value):
    saver = Checkpoints(run, keep_last=1)
    saver.save(15, tensors(15) | {"visual.bias": torch.tensor([1.0, value])}, {}, {"step": 15})
    with pytest.raises(UserError, match=r"^step 15: the weights are not finite \(visual.bias\), .*; lower train.lr"):
        saver.wait()
    assert steps(run) == [5, 10]


@pytest.mark.parametrize("what", ["moved", "removed", "replaced"])
def test_a_run_folder_that_is_gone_is_told_and_not_made_anew(tmp_path, what):
    run = tmp_path / "run"
    run.mkdir()
    saver = Checkpoints(run, keep_last=1)
    save(saver, 5)
    run.rename(tmp_path / "elsewhere")
    if what == "replaced":
        run.mkdir()
    with pytest.raises(
        UserError, match="was moved, removed or replaced while the run went on, so step 10 cannot be saved"
    ):
        saver.save(10, tensors(10), {}, {"step": 10})
    assert not (run / "checkpoints").exists() and steps(tmp_path / "elsewhere") == [5]


def test_a_checkpoint_that_is_retired_while_it_is_read_is_read_anew(run):
    seen = []

    def read(folder, checkpoint):
        seen.append(checkpoint.name)
        if len(seen) == 1:  # the run goes on meanwhile
            save(Checkpoints(run, keep_last=1), 15)
        return checkpoints.read_weights(checkpoint)

    assert checkpoints.read_resolved(run, read)["visual.proj"][0, 0] == 15 and seen == ["step-10", "step-15"]


def test_a_checkpoint_asked_for_by_name_that_is_retired_is_one_line(run):
    def read(folder, checkpoint):
        shutil.rmtree(checkpoint)
        return checkpoints.read_weights(checkpoint)

    with pytest.raises(UserError, match="cannot be used: step-5: no manifest.json"):
        checkpoints.read_resolved(run / "checkpoints" / "step-5", read)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"files": {}}, "unreadable manifest.json"),
        ({"step": 4}, "it is the checkpoint of step 10"),
        ({"files": 7}, "unreadable manifest.json"),
        ({"format": None}, "format None, this version reads 1"),
    ],
)
def test_a_manifest_that_says_something_else_is_not_believed(run, change, words):
    path = run / "checkpoints" / "step-10" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    newest, (why,) = newest_valid(run)
    assert newest.name == "step-5" and why.startswith(f"step-10: {words}")


def test_a_checkpoint_under_another_steps_name_is_passed_over(run):
    (run / "checkpoints" / "step-10").rename(run / "checkpoints" / "step-999")
    newest, (why,) = newest_valid(run)
    assert newest.name == "step-5" and why == "step-999: it is the checkpoint of step 10"


def test_of_many_damaged_checkpoints_no_weights_are_read_to_find_the_good_one(run, monkeypatch):
    folder = run / "checkpoints"
    for step in range(11, 15):
        shutil.copytree(folder / "step-10", folder / f"step-{step}")  # each says that it is of step 10
    (folder / "step-14" / "state.json").write_text("x")
    read = []
    monkeypatch.setattr(checkpoints, "describe", lambda path: read.append(path) or describe(path))
    newest, passed_over = newest_valid(run)
    assert newest == folder / "step-10" and len(passed_over) == 4
    assert "step-14: state.json has 1 bytes" in passed_over[0] and "checkpoint of step 10" in passed_over[1]
    assert {path.parent.name for path in read if path.suffix == ".safetensors"} == {"step-10"}


def test_where_the_metrics_are_lost_no_checkpoint_is_published(run, monkeypatch):
    """Some file systems say only at fsync that a quota is used up."""
    journal = Journal(run / "metrics.jsonl", 10)
    journal.append({"step": 11})
    fsync, of_journal = os.fsync, journal._file.fileno()

    def failing(file):
        if file == of_journal:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    saver = Checkpoints(run, keep_last=2)
    saver.save(15, tensors(15), {}, {"step": 15}, journal.sync)
    with pytest.raises(UserError, match="metrics.jsonl"):
        saver.wait()
    assert steps(run) == [5, 10]
    journal.close()  # at the end of a run that has failed already
