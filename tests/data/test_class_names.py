"""Class names as people write them: the right names, or one line that says what is wrong."""

import numpy as np
import pytest

from mmtard.config import Data
from mmtard.data.class_names import classnames, read_names, templates
from mmtard.errors import UserError


class Labels:
    def __init__(self, highest):
        self.labels = np.array([0, highest])


@pytest.mark.parametrize("data, names", [
    ("cat\ndog\nbird\n", ["cat", "dog", "bird"]),
    ("\ufeffcat\ndog\nbird", ["cat", "dog", "bird"]),
    ("cat\r\ndog\r\nbird\r\n\r\n", ["cat", "dog", "bird"]),
    ("cat\rdog\rbird", ["cat", "dog", "bird"]),
    ("cat\ndog\u2028big\nbird\n", ["cat", "dog\u2028big", "bird"]),
    ("ca\x85t\nd\x0bo\x0cg\nbi\x1crd\n \n", ["ca\x85t", "d\x0bo\x0cg", "bi\x1crd"]),
    ("crane\ncrane\nbird\n", ["crane", "crane", "bird"]),
    (" great white shark \n7\nn01440764", ["great white shark", "7", "n01440764"]),
])  # fmt: skip
def test_names_are_read_as_they_stand(tmp_path, data, names):
    (tmp_path / "n.txt").write_bytes(data.encode())
    assert read_names(tmp_path / "n.txt", "data.classnames") == names
    assert classnames(Data(shards="x", classnames=str(tmp_path / "n.txt")), Labels(2)) == names


@pytest.mark.parametrize("data, words", [
    (b"cat\n\ndog\nbird\n", "line 2 of '.*' is blank, and a name's line is its label; name the class there"),
    (b"\ncat\ndog\nbird\n", "line 1 of '.*' is blank"),
    (b"0,cat\n1,dog\n2,bird\n", r"begin with numbers \('0,cat'\); write the names alone"),
    (b"1: cat\n2: dog\n3: bird\n", "begin with numbers"),
    ("cat\ndog\nbird\n".encode("utf-16"), "cannot read '.*'; give a text file in UTF-8|cannot read"),
    ("caf\u00e9\ndog\nbird\n".encode("latin-1"), "cannot read .* give a text file in UTF-8, one entry a line"),
    (b"cat\ndog\n", "has 2 names, and the shards have a sample of label 2"),
    (b"['cat', 'dog', 'bird']\n", "has 1 names, and the shards have a sample of label 2"),
    (b"", "has 0 names"),
])  # fmt: skip
def test_what_is_no_list_of_names_is_refused_in_one_line(tmp_path, data, words):
    (tmp_path / "n.txt").write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        classnames(Data(shards="x", classnames=str(tmp_path / "n.txt")), Labels(2))
    assert str(caught.value).startswith("data.classnames: ") and "\n" not in str(caught.value)


def test_prompts_are_read_by_the_same_rules(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffa photo of a {c}.\r\n\r\nthe\u2028{}\r\n".encode())
    assert templates(Data(shards="x", templates=str(tmp_path / "t.txt"))) == ["a photo of a {}.", "the\u2028{}"]


def test_templates(tmp_path):
    (tmp_path / "t.txt").write_text("a photo of a {c}.\n\na {}\n")
    assert templates(Data(shards="x", templates=str(tmp_path / "t.txt"))) == ["a photo of a {}.", "a {}"]
    assert templates(Data(shards="x")) == ["This is a photo of a {}"]
    for bad in (["a photo"], ["a {name}"], ["a {} {x}"], [], str(tmp_path / "none.txt")):
        with pytest.raises(UserError, match="data.templates"):
            templates(Data(shards="x", templates=bad))


def test_classnames_that_are_not_there(folder):
    with pytest.raises(UserError, match="no classnames.txt beside"):
        classnames(Data(shards=str(folder)), None)
    with pytest.raises(UserError, match="cannot read"):
        classnames(Data(shards=str(folder), classnames="/nowhere/names.txt"), None)
