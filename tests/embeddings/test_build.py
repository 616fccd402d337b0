"""Teachers whose embeddings are stored: `mmtard cache`, and training that reads what it stored."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_shards import encode, picture, write_tar

from mmtard import config as settings
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.order import Order
from mmtard.data.samples import SampleReader
from mmtard.data.stream import TrainStream
from mmtard.distributed import ranks
from mmtard.distributed.interruption import EXIT_REQUEUE, Interruption
from mmtard.embeddings.build import _Storing, cache
from mmtard.embeddings.store import EmbeddingStore, PartLayout
from mmtard.errors import RunError, UserError
from mmtard.models import loading
from mmtard.training.preflight import Models, StoredEmbeddings
from mmtard.training.preflight_check import Bench
from mmtard.training.train import train

SAMPLES, BATCH = 40, 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 20 samples, one of them unreadable."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(2):
        members = []
        for i in range(20 * n, 20 * n + 20):
            members += [
                (f"s{i:04d}.jpg", b"nothing" if i == 7 else encode(picture(i))),
                (f"s{i:04d}.cls", str(i % 3).encode()),
            ]
        write_tar(folder / f"{n}.tar", members)
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_group():
    """A group of this process alone for all runs here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "0")
            patch.delenv(name)  # what joining sets is put back
        ranks.start("cpu")
        with patch.context() as inner:
            inner.setattr(ranks, "stop", lambda *_: None)
            yield
        ranks.stop()


@pytest.fixture
def run(tmp_path, shards, vit, resnet):
    """Call with dotted overrides: the configuration of a short MMT-ARD run whose clean teacher is a small ResNet."""
    tree = {
        "run_dir": str(tmp_path / "run"),
        "seed": 3,
        "student": {"arch": vit, "weights": "random"},
        "teachers": {"clean": {"arch": resnet, "weights": "random"}, "robust": {"arch": vit, "weights": "random"}},
        "method": {"name": "mmtard", "weighting": "confidence_sigmoid"},
        "attack": {"eps": "8/255", "steps": 1, "alarm_every": 5},
        "data": {
            "shards": str(shards), "lanes": 4, "window": 4, "workers": 0, "max_replaced": "1/2",
            "embeddings": str(tmp_path / "embeddings"),
        },
        "train": {"steps": 12, "batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-3},
        "engine": {"precision": "float32", "device": "cpu", "zero_stage": 0},
        "log": {"tensorboard": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    return lambda *overrides: settings.load(tmp_path / "run.yaml", overrides)


def store(config, interruption=None):
    """(what `mmtard cache` says, the one folder it stored)."""
    said = []
    cache(config, interruption or Interruption(), said.append)
    (folder,) = Path(config.data.embeddings).iterdir()
    return said, folder


def trained(config):
    """(lines of metrics.jsonl without times, sha256 of the last weights)."""
    assert train(config, Interruption()) == 0
    folder = Path(config.run_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s", "tflops_a_rank", "memory_gib")
    weights = (folder / "checkpoints" / "latest" / "weights.safetensors").read_bytes()
    return [{k: v for k, v in line.items() if k not in timed} for line in lines], hashlib.sha256(weights).hexdigest()


AUGMENTED = ("data.crop_scale=[0.3,1.0]", "data.flip=true", "data.views=2")


@pytest.mark.parametrize("augmentation", [(), AUGMENTED], ids=["as they are", "two views"])
def test_training_on_stored_embeddings_is_training_with_the_teacher_to_the_last_bit(run, tmp_path, capfd, augmentation):
    """Two and a half epochs in micro-batches, of a set with an unreadable image."""
    config = run("teachers.clean.stored=true", f"run_dir={tmp_path}/stored", *augmentation)
    _, folder = store(config)
    on_disk = trained(config)
    printed = capfd.readouterr().out
    assert f"teacher clean: stored in {folder} (made 4 images at a time), 1.26 MiB, a rank holds 0.00 MiB\n" in printed
    live = trained(run(f"run_dir={tmp_path}/live", *augmentation))
    assert len(on_disk[0]) == 12 and on_disk[0][-1]["replaced"] == 2
    assert on_disk == live
    ends = (tmp_path / name / "checkpoints" / "latest" / "state.json" for name in ("stored", "live"))
    stored_too, same = (json.loads(path.read_text())["teachers_sha256"] for path in ends)
    assert stored_too == same and same.keys() == {"clean", "robust"}


def test_the_views_of_a_sample_come_round_and_its_random_start_does_not(shards):
    dataset = open_dataset(settings.Data(shards=str(shards)))
    order, crop = Order(dataset.shard_counts, 1, 4, 4), Transform(16, crop_scale=(0.3, 1.0))
    looks, starts = {}, {}
    data = settings.Data(shards=str(shards), workers=0, views=3, max_replaced=1)
    for batch in TrainStream(SampleReader(dataset, crop, seed=1), order, data, batch_size=SAMPLES, steps=range(4)):
        for image, sample, seed in zip(batch.images, batch.sample_ids.tolist(), batch.seeds.tolist()):
            looks.setdefault(sample, []).append(image)
            starts.setdefault(sample, set()).add(seed)
    first, second, third, again = looks[3]
    assert again.equal(first) and not first.equal(second) and not first.equal(third) and len(starts[3]) == 4
    # It stands in for the unreadable sample 7, looking as it does itself: views 0, 1, 2, 0 twice each, so 6 + 1 + 1
    # equal pairs.
    assert len(looks[8]) == 8 and sum(a.equal(b) for i, a in enumerate(looks[8]) for b in looks[8][:i]) == 8


def test_with_no_teacher_of_adversarial_images_all_are_stored_and_none_runs_in_the_loop(run, tmp_path, monkeypatch):
    recipe = (
        "method.views={robust: clean_for_adv, clean: clean}",
        "method.trust=clean",
        "attack.objective=kl_robust",
        "terms.anchor={teacher: clean}",
        "terms.feature={teacher: robust}",
        "train.steps=2",
    )
    live = trained(run(*recipe, f"run_dir={tmp_path}/live"))
    said = []
    cache(run(*recipe), Interruption(), said.append)
    assert [line.split(":")[0] for line in said if "to be stored" in line] == ["teacher clean", "teacher robust"]
    monkeypatch.setattr("mmtard.models.teachers.FrozenTeacher.__call__", lambda *_: pytest.fail("a teacher ran"))
    stored = ("teachers.clean.stored=true", "teachers.robust.stored=true", f"run_dir={tmp_path}/stored")
    assert trained(run(*recipe, *stored)) == live
    with pytest.raises(UserError, match="teachers.robust.stored: .* shows this teacher adversarial images"):
        cache(run(*recipe, *stored, "terms.feature.teacher_view=adv"), Interruption())


# ---------------------------------------------------------------- what is stored


def test_what_is_stored_is_what_the_teacher_says_of_each_image(run, shards):
    """In bfloat16, as beside a bf16 student; the unreadable image has none."""
    config = run("engine.precision=bf16", "data.resize=20")
    said, folder = store(config)
    assert said[-1].endswith("train with teachers.clean.stored=true")
    part = load_file(folder / "part-000000.safetensors")
    assert part["embeddings"].dtype == torch.bfloat16 and part["embeddings"].shape[:2] == (SAMPLES, 1)
    tower = (
        loading.load_clip(config.teachers["clean"], config.seed, "teachers.clean").tower().cast(torch.bfloat16).eval()
    )
    image = torch.from_numpy(Transform(16, 20)(picture(12).convert("RGB"), 0))
    with torch.no_grad():
        alone = tower(image[None].float() / 255)[0]
    embeddings = EmbeddingStore(folder)
    (read,) = embeddings.rows(np.array([12]), np.array([0]))
    assert read.dtype == torch.float32 and torch.allclose(
        read, alone, rtol=2e-2, atol=2e-2 * alone.abs().max()
    )  # a JPEG lies between
    with pytest.raises(UserError, match="sample number 7 is absent, its image could not be read"):
        embeddings.rows(np.array([6, 7]), np.array([0, 0]))


@pytest.fixture
def small_parts(monkeypatch):
    """Ten parts of four samples."""
    monkeypatch.setattr("mmtard.embeddings.store.LEAST_SAMPLES", 4)


def test_a_store_goes_on_where_it_was_stopped_and_mends_what_is_damaged(run, tmp_path, small_parts):
    config = run()
    said = []

    class Third(Interruption):
        """Comes in the third batch, which is the third part."""

        def __bool__(self):
            said.append("asked")
            self.signal = "SIGTERM" if said.count("asked") == 3 else None
            return self.signal is not None

    with pytest.raises(
        RunError, match="SIGTERM; 3 of 10 missing parts of teacher clean are stored, start it again to go on"
    ) as caught:
        cache(config, Third(), said.append)
    assert caught.value.status == EXIT_REQUEUE
    (folder,) = (tmp_path / "embeddings").iterdir()
    with pytest.raises(
        UserError, match=f"teachers.clean.stored: '{folder}' is not complete; let `mmtard cache` finish it"
    ):
        train(run("teachers.clean.stored=true"), Interruption())
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / ".part-000003.safetensors.77.part").write_bytes(b"half")  # of a process that was killed as it wrote
    assert "teacher clean: 7 of 10 parts are to be stored" in store(config)[0][0]
    assert whole.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items() and not list(
        folder.glob(".*")
    )
    assert store(config)[0] == [f"teacher clean: all of its 40 x 1 embeddings are stored in {folder}, nothing to do"]

    part = folder / "part-000002.safetensors"
    before = part.read_bytes()
    part.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(
        UserError,
        match="part-000002.safetensors': that of sample number 11 is damaged; `mmtard cache` makes them again",
    ):
        train(run("teachers.clean.stored=true"), Interruption())
    part.unlink()
    with pytest.raises(UserError, match="part-000002.safetensors' are missing or cut short"):
        train(run("teachers.clean.stored=true", f"run_dir={tmp_path}/other"), Interruption())
    assert "1 of 10 parts are to be stored" in store(config)[0][0] and part.read_bytes() == before


def test_what_fills_up_a_last_batch_is_no_image_again_and_again():
    plan = _Storing._plan(SimpleNamespace(layout=PartLayout(600, 1), batch=48), [0])
    assert (
        len(plan.samples) == 96
        and np.bincount(plan.samples).max() <= 2
        and set(plan.samples) == set(PartLayout(600, 1).part(0))
    )


def test_a_start_in_which_no_part_gets_done_is_not_asked_for_again(run):
    interruption = Interruption()
    interruption.signal = "SIGUSR2"
    with pytest.raises(RunError, match="stopped by SIGUSR2; 0 of 1 missing parts .* give it more time") as caught:
        cache(run(), interruption, lambda line: None)
    assert caught.value.status == 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, told",
    [
        (
            "seed=4",
            r"differ in teacher.sha256: stored [0-9a-f]{16}, now [0-9a-f]{16}; restore that, or run `mmtard cache`",
        ),
        ("data.resize=20", "differ in images.resize: stored 16, now 20;"),
        ("engine.precision=bf16", "differ in teacher.precision: stored float32, now bf16;"),
        ("data.shards=OTHER", r"differ in data.fingerprint: stored [0-9a-f]{16}, now [0-9a-f]{16};"),
        ("student.arch=RESNET", "differ in images.size: stored 16, now 32; images.resize: stored 16, now 32;"),
    ],
)
def test_embeddings_that_do_not_match_are_refused_naming_what_differs(run, shards, resnet, tmp_path, change, told):
    store(run())
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(shards / "0.tar", other / "0.tar")
    shutil.copy(shards / "classnames.txt", other)
    change = change.replace("OTHER", str(other)).replace("RESNET", resnet)
    # A random teacher is another with another seed.
    with pytest.raises(
        UserError,
        match=rf"^teachers.clean.stored: no embeddings stored in '{tmp_path}/embeddings' match,"
        rf" those in '[0-9a-f]+' {told}",
    ):
        train(run("teachers.clean.stored=true", change), Interruption())


def test_what_cannot_be_stored_is_refused_with_the_remedy(run):
    with pytest.raises(UserError, match="holds no stored embeddings; run `mmtard cache` with this configuration first"):
        train(run("teachers.clean.stored=true"), Interruption())
    with pytest.raises(
        UserError, match="teachers.robust.stored: method 'mmtard' .* shows this teacher adversarial images"
    ):
        cache(run("teachers.robust.stored=true"), Interruption())
    for changed in (["data.flip=true"], ["data.crop_scale=[0.5,1]"]):
        with pytest.raises(
            UserError,
            match="teachers.clean.stored: data.crop_scale and data.flip make new images each epoch.* data.views=8",
        ):
            run("teachers.clean.stored=true", *changed)
        with pytest.raises(UserError, match="^data.views: data.crop_scale and data.flip make new images"):
            cache(run(*changed), Interruption())
    with pytest.raises(
        UserError, match="data.views: without data.crop_scale or data.flip all views of a sample are the same"
    ):
        run("data.views=2")
    with pytest.raises(UserError, match="every teacher of 'tecoa' sees adversarial images, or it has none"):
        cache(run("method={name: tecoa}", "teachers=null"), Interruption())


def test_the_untouched_student_of_fare_is_stored_before_its_run_exists(run, tmp_path):
    fare = ("method={name: fare}", "teachers={start: {stored: true}}", "train.steps=2")
    store(run(*fare))
    on_disk = trained(run(*fare, f"run_dir={tmp_path}/stored"))
    assert on_disk == trained(run("method={name: fare}", "teachers=null", "train.steps=2", f"run_dir={tmp_path}/live"))


def test_preflight_tells_whether_the_stored_embeddings_match(run, capsys):
    config = run("teachers.clean.stored=true")
    bench = Bench(config, ranks.start("cpu"))
    assert bench.run(Models()) and not bench.run(StoredEmbeddings())
    _, folder = store(config)
    assert bench.run(StoredEmbeddings())
    models, absent, there = capsys.readouterr().out.splitlines()
    assert models.startswith("PASS models: student, robust load;")
    assert (
        absent.startswith("FAIL embeddings: rank 0 (") and "run `mmtard cache` with this configuration first" in absent
    )
    assert there == f"PASS embeddings: those of teacher clean are stored in {folder} and match"
