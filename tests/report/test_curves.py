import numpy as np
from written import write_run

from mmtard.report import accuracy, curves, sources


def test_every_column_of_the_metrics_has_its_figure(tmp_path, quick_figures):
    found = sources.read([write_run(tmp_path / "a")])
    assert [f.name for f in curves.losses(found)] == ["training-loss", "training-kl-robust"]
    assert [f.name for f in curves.optimisation(found)] == ["training-lr", "training-grad-norm"]
    assert [f.name for f in curves.speed(found)] == ["training-images-per-s", "training-seconds", "training-memory-gib"]
    (weights,) = curves.teacher_weights(found)
    assert weights.name == "weights-a" and "clean from 5 to 5; robust from 41 to 50" in weights.alt
    assert weights.caption == "Bands: from the 10th to the 90th percentile of the batch."
    assert curves.losses(found)[0].alt == "loss over the training steps: a from 3 to 0.3."
    assert all(f.png.startswith(b"\x89PNG") for f in curves.probes(found))
    assert [f.name for f in curves.probes(found)] == ["probe-clean", "probe-robust"]
    assert "a from (86.0, 10.0) to (70.0, 50.0)" in accuracy.trajectory(found).alt


def test_a_run_without_probes_or_weights_has_no_such_figure(tmp_path, quick_figures):
    found = sources.read([write_run(tmp_path / "a", rows=[{"step": 1, "loss": 1.0}], probes=None)])
    assert (
        curves.probes(found) == curves.teacher_weights(found) == curves.speed(found) == []
        and accuracy.trajectory(found) is None
    )
    assert [f.name for f in curves.losses(found)] == ["training-loss"]


def test_numbers_that_were_not_finite_are_gaps():
    steps, values = curves.column(
        [
            {"step": 1, "x": 2.0},
            {"step": 2, "x": None},
            {"step": 3},
            {"step": 4, "x": float("nan")},
            {"step": 5, "x": 3},
        ],
        "x",
    )
    assert steps.tolist() == [1, 5] and values.tolist() == [2.0, 3.0]


def test_a_long_run_is_drawn_as_means_of_equal_parts():
    class Axes:
        def plot(self, steps, values, **_):
            self.line = steps, values

        def fill_between(self, steps, low, high, **_):
            self.band = low, high

    axes, steps = Axes(), np.arange(1, 6001)
    curves._line(axes, steps, np.where(steps % 2, 1.0, 3.0), "x", {"color": "k", "linestyle": "-"})
    assert len(axes.line[0]) == 300 and axes.line[0][0] == 10.5 and set(axes.line[1]) == {2.0}
    assert set(axes.band[0]) == {1.0} and set(axes.band[1]) == {3.0}
