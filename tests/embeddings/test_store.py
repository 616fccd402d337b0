"""The files of stored embeddings: a part in its place, rows that a model can have given, damage that is one line."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtard.embeddings.settings import MANIFEST, manifests
from mmtard.embeddings.store import EmbeddingStore, PartLayout, find_store, finish, missing_parts, part_name, write_part
from mmtard.errors import UserError
from mmtard.files import settings_digest

SAMPLES, IDENTITY = 40, {"teacher.sha256": "a" * 64}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Call with rows [40,1,D] and an identity: the folder of a finished store of ten parts of four samples."""
    monkeypatch.setattr("mmtard.embeddings.store.LEAST_SAMPLES", 4)

    def store(rows, identity=IDENTITY):
        folder = tmp_path / "embeddings" / settings_digest(identity)
        folder.mkdir(parents=True, exist_ok=True)
        layout = PartLayout(SAMPLES, 1)
        for number in range(layout.parts):
            ids = layout.part(number)
            write_part(folder, number, rows[ids.start : ids.stop], torch.ones(len(ids), dtype=torch.bool))
        finish(folder, layout, identity, {"images_at_once": 4})
        return folder

    return store


@pytest.fixture
def rows():
    return torch.randn(SAMPLES, 1, 8, generator=torch.Generator().manual_seed(0))


ALL = np.arange(SAMPLES), np.zeros(SAMPLES, dtype=np.int64)


def test_rows_come_back_bit_for_bit(make, rows):
    assert torch.equal(EmbeddingStore(make(rows)).rows(*ALL), rows[:, 0])


def test_two_parts_that_changed_places_are_noticed_and_made_again(make, rows):
    folder = make(rows)
    a, b = folder / part_name(2), folder / part_name(5)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(
        UserError, match=r"part-000002.*it is part 5 of store '\w+', copied to another's place; `mmtard"
    ):
        EmbeddingStore(folder).rows(*ALL)
    assert missing_parts(folder, PartLayout(SAMPLES, 1), range(10)) == [2, 5]


def test_a_part_of_another_teachers_store_is_noticed(make, rows):
    other = make(rows + 1, {"teacher.sha256": "b" * 64})
    folder = make(rows)
    shutil.copy(other / part_name(3), folder / part_name(3))
    with pytest.raises(UserError, match=f"it is part 3 of store '{other.name}', copied to another's place"):
        EmbeddingStore(folder).rows(*ALL)


def test_parts_of_versions_that_did_not_name_their_place_are_read(make, rows):
    folder = make(rows)
    for path in folder.glob("part-*"):
        save_file(load_file(path), path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parts"] = {path.name: path.stat().st_size for path in folder.glob("part-*")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert torch.equal(EmbeddingStore(folder).rows(*ALL), rows[:, 0])
    assert missing_parts(folder, PartLayout(SAMPLES, 1), range(10)) == []


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda r: r[7].fill_(0), "are zero"),
        (lambda r: r[7, 0, 0].fill_(float("nan")), "are not finite"),
        (lambda r: r[7].fill_(1e30), r"are too large \(up to 1e\+30\)"),
        (lambda r: r.copy_(r[:1].expand_as(r).clone()), "are the same for 40 different images"),
    ],
)
def test_rows_that_no_model_gives_are_refused(make, rows, spoil, words):
    spoil(rows)
    with pytest.raises(UserError, match=f"^stored embeddings '.*' {words}.*; mend the teacher's weights"):
        EmbeddingStore(make(rows)).rows(*ALL)


def test_a_damaged_manifest_is_one_line_and_its_store_is_not_found(make, rows, tmp_path):
    folder = make(rows)
    content = json.loads((folder / MANIFEST).read_text())
    for damaged in (
        "",
        "[1]",
        "[" * 100_000,
        json.dumps({**content, "samples": "forty"}),
        json.dumps({**content, "parts": []}),
        json.dumps({k: v for k, v in content.items() if k != "views"}),
    ):
        (folder / MANIFEST).write_text(damaged)
        assert manifests(tmp_path / "embeddings") == {}
        with pytest.raises(UserError, match="is damaged; `mmtard cache` makes it again"):
            EmbeddingStore(folder)
        with pytest.raises(UserError, match="is not complete; let `mmtard cache` finish it"):
            find_store(tmp_path / "embeddings", IDENTITY, "teachers.clean.stored")
    (folder / MANIFEST).write_text(json.dumps({**content, "parts": {}}))
    with pytest.raises(UserError, match="part-000000.safetensors' are missing or cut short"):
        EmbeddingStore(folder)


def test_a_damaged_part_is_one_line(make, rows):
    """200 mutations of a part: refused in one line, or the rows are those that were stored."""
    folder = make(rows)
    path, dice, refusals = folder / part_name(1), random.Random(0), 0
    original = path.read_bytes()
    for _ in range(200):
        content = bytearray(original)
        for _ in range(dice.choice((1, 3, 20))):
            at = dice.randrange(min(len(content), 200)) if dice.random() < 0.5 else dice.randrange(len(content))
            content[at] = dice.randrange(256)
        path.write_bytes(content)
        try:
            assert torch.equal(EmbeddingStore(folder).rows(*ALL), rows[:, 0])
        except UserError as error:
            assert re.match("stored embeddings '.*part-000001", str(error)) and "\n" not in str(error)
            refusals += 1
            assert missing_parts(folder, PartLayout(SAMPLES, 1), range(10)) == [1]
    assert refusals > 150
