"""A run folder whose files are damaged in random ways: one line at most, never a traceback, and nothing hidden."""

import json
import random
import shutil

import pytest
import torch
import yaml

from mmtard import config
from mmtard.errors import RunError, UserError
from mmtard.runs import checkpoints, folder, history, lock, survey, trackers
from mmtard.runs.checkpoint_writer import Checkpoints
from mmtard.runs.metrics import MetricLogger
from mmtard.runs.probes import differences
from mmtard.training.probe import _read

MUTATIONS = 80
VALUES = (None, 1, -1, 1e308, "x", "", [], {}, True, [None], {"a": 1}, "../../x", 10**400, "9" * 5000)
RAW = (b"", b"\0" * 300, b"\xff\xfe\n", b"[" * 3000, b'"x"\n', b"12\n", b"null", b"{}", b'{"step": 3}\n', b"\n\n")


@pytest.fixture
def whole(tree, write, ranks, monkeypatch):
    """A run folder with one of every file."""
    monkeypatch.setattr(folder, "environment", lambda hosts: {"hosts": hosts})
    monkeypatch.setattr(lock, "LOCK_WAIT_S", 0.0)
    monkeypatch.setenv("PATH", "")  # no Slurm answers
    run = folder.prepare(config.load(write(tree)), "f", ranks).path
    saver = Checkpoints(run, keep_last=5)
    for step in (3, 6):
        saver.save(step, {"w": torch.ones(2)}, {"exp_avg.w": torch.ones(2)}, {"step": step, "data_fingerprint": "f"})
        saver.wait()
    history.record_end(run, history.PREEMPTED, "why", 6)
    row = {"step": 6, "clean": 0.5, "robust": 0.25, "protocol": {"norm": "linf"}}
    for name, line in (("metrics", {"step": 6, "seconds": 1.0}), ("events", {"step": 6}), ("probes", row)):
        (run / f"{name}.jsonl").write_text((json.dumps(line) + "\n") * 3)
    (run / "wandb.json").write_text('{"id": "abcd"}')
    (run / "goes_on_as").write_text("12 13\n")
    results = {"settings": {"norm": "linf"}, "averages": {"all": {"eps": {"2/255": {"robust": 0.5}}}}}
    (run / "evaluations" / "quick").mkdir(parents=True)
    (run / "evaluations" / "quick" / "results.json").write_text(json.dumps(results))
    return run


def mutate(path, rng):
    """Damage a file as disks, power cuts, editors and strangers do."""
    content = bytearray(path.read_bytes())
    how = rng.randrange(6)
    if how == 0:
        content = content[: rng.randrange(len(content) + 1)]
    elif how == 1 and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 2:
        content = bytearray(rng.choice(RAW))
    elif how == 3:
        at = rng.randrange(len(content) + 1)
        content[at:at] = rng.choice(RAW)
    else:
        content = _with_another_value(content, path, rng)
    path.write_bytes(content)


def _with_another_value(content, path, rng):
    """The same JSON or YAML with one value replaced or left out."""
    lines = content.decode("utf-8", "replace").splitlines() if path.suffix == ".jsonl" else None
    try:
        document = json.loads(lines[0]) if lines else yaml.safe_load(bytes(content))
    except (ValueError, yaml.YAMLError):
        return bytearray(rng.choice(RAW))
    at, inside = document, None
    while isinstance(at, dict) and at and (inside is None or rng.random() < 0.7):
        inside, key = at, rng.choice(list(at))
        at = at[key]
    if inside is None:
        return bytearray(rng.choice(RAW))
    if rng.random() < 0.3:
        del inside[key]
    else:
        inside[key] = rng.choice(VALUES)
    changed = yaml.safe_dump(document) if path.suffix == ".yaml" else json.dumps(document)
    return bytearray("\n".join([changed, *(lines or [""])[1:]]).encode())


@pytest.mark.slow
def test_damaged_files_of_a_run_are_told_in_one_line(whole, tree, write, ranks, tmp_path):
    rng, settings, refused = random.Random(5), config.load(write(tree)), 0
    kept = tmp_path / "kept"
    shutil.copytree(whole, kept, symlinks=True)
    names = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file() and not path.is_symlink())
    names = [name for name in names if name.parts[:2] != ("checkpoints", "latest")]
    for n in range(MUTATIONS):
        shutil.rmtree(whole)
        shutil.copytree(kept, whole, symlinks=True)
        damaged = [rng.choice(names) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        for name in damaged:
            mutate(whole / name, rng)
        shown = survey.find_runs(whole)
        assert [row.run for row in shown] == [whole], damaged  # told of, whatever its files hold
        readers = (
            lambda: history.why_not_restart(whole, settings.resume),
            lambda: history.current_job(whole, (history.read(whole) or [{}])[-1]),
            lambda: checkpoints.read_resolved(whole, lambda run, at: checkpoints.read_weights(at)),
            lambda: trackers._identity(whole),
            lambda: differences([row["protocol"] for row in _read(whole / "probes.jsonl")], {"norm": "linf"}),
            lambda: folder.prepare(settings, "f", ranks),
            lambda: MetricLogger(whole, 6, 10, 99).close(),
            lambda: history.record_end(whole, history.LOST, "again", 6),
        )
        for reader in readers:
            try:
                reader()
            except (UserError, RunError) as error:
                assert len(str(error)) < 2000 and "\n" not in str(error), (n, damaged, error)
                refused += 1
            except Exception as error:
                raise AssertionError(f"mutation {n} of {damaged}") from error
    assert MUTATIONS / 10 < refused < MUTATIONS * len(readers) / 2  # most of it is mended or passed over
