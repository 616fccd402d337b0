"""The study that most tests of studies begin with."""

import pytest
from tiny_study import tree, write

from mmtard.study import loading


@pytest.fixture
def study(tmp_path, vit):
    """Call with changes: the study that the file resolves to."""
    return lambda *overrides, **changes: loading.load(
        write(tmp_path / "study.yaml", tree(tmp_path / "out", vit, **changes)), overrides
    )
