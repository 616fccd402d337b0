"""The folder of an evaluation's results where none is named: another evaluation has another one."""

from contextlib import nullcontext

import pytest
from tiny_datasets import write

import mmtard
from mmtard.cli.main import main
from mmtard.evaluation import evaluate as evaluation, table


@pytest.fixture
def root(tmp_path):
    """A dataset `b`."""
    write(tmp_path / "root" / "b", 8, size=(8, 8))
    return tmp_path / "root"


@pytest.fixture
def out_of(root, monkeypatch):
    """Call with words of `mmtard evaluate`, or arguments of `mmtard.evaluate`: its default folder."""
    asked = []

    def measured(request, *_, **__):
        asked.append(request.out)
        return {"datasets": []}

    monkeypatch.setattr(evaluation, "evaluate", measured)
    monkeypatch.setattr(table, "show", lambda *_: None)
    monkeypatch.setattr(
        "mmtard.distributed.ranks.process_group", lambda device: nullcontext(type("", (), {"is_first": 1}))
    )

    def call(*words, **arguments):
        if arguments:
            mmtard.evaluate("random", root / "b", "quick", arch="ViT-B-32", **arguments)
        else:
            assert main(["evaluate", "random", "--arch", "ViT-B-32", "--data", str(root / "b"), *words]) == 0
        return asked[-1]

    return call


def test_evaluations_that_read_the_data_otherwise_have_other_folders(out_of, tmp_path):
    for name, text in (("one", "x\ny\n"), ("same", "x\ny\n"), ("other", "x\nz\n")):
        (tmp_path / name).write_text(text)
    plain = out_of()
    assert plain == out_of(batch_size=None), "the same evaluation from Python"
    one, same, other = (out_of("--classnames", str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same == out_of(classnames=tmp_path / "one"), "what counts is the names"
    index = out_of("--index", str(tmp_path / "index.npz"))
    assert index == out_of(index=tmp_path / "index.npz")
    others = [plain, one, other, index, out_of("--label-key", "k"), out_of("--caption-key", "k")]
    others += [out_of("--transfer-from", "random", "--transfer-arch", arch) for arch in ("ViT-B-16", "ViT-B-32")]
    assert len(set(others)) == len(others)


def test_a_folder_keeps_its_name_where_none_of_it_is_given(out_of, monkeypatch):
    """The digest of earlier versions, or a finished evaluation would be measured again."""
    monkeypatch.setattr("pathlib.Path.resolve", lambda path: type(path)("/data/b"))
    assert out_of().name == "quick-b-linf-2_255-3f529e83"
