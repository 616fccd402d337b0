"""The cost model of `mmtard bench scale`: its counts and sums by hand, and what it says of the main run."""

import json
from dataclasses import replace

import pytest

from mmtard import config as settings, resources
from mmtard.benchmarks.machine import Machine, measured
from mmtard.benchmarks.scale import (
    PARTS,
    ScaleBenchmark,
    Work,
    bandwidth_of,
    binds_first,
    predict,
    travelling_weights,
    work_of,
)
from mmtard.config import Lora
from mmtard.errors import UserError

TEACHERS = ["teachers.clean.arch=ViT-L-14", "teachers.robust.arch=ViT-L-14"]


@pytest.fixture(scope="module")
def main_run():
    path = resources.find_config("vitb32_mmtard")
    return settings.load(path, [*TEACHERS, "teachers.clean.stored=false"])


@pytest.fixture(scope="module")
def work(main_run):
    return work_of(main_run)


def test_the_main_runs_arithmetic_is_that_of_its_models(work):
    """2 teacher forwards, 20 and 6 of the student, each less what the last block need not do for the patches."""
    large, small = forward_by_hand(257, 1024, 24, 588, 768), forward_by_hand(50, 768, 12, 3072, 512)
    assert (large, small) == pytest.approx((162e9, 8.8e9), rel=0.01)
    assert 0.95 * 2 * large < work.flops["teachers"] < 2 * large
    assert 0.93 * 20 * small < work.flops["attack"] < 20 * small
    assert work.flops["student"] == pytest.approx(6 / 20 * work.flops["attack"], rel=1e-6)
    assert (work.attack_steps, work.teacher_forwards, work.trained) == (10, 2, 87849216)


def forward_by_hand(tokens, width, layers, pixels, out):
    """FLOPs of a ViT's forward: patches, and a block's four projections, two of attention, an MLP of four widths."""
    block = 2 * tokens * width * (4 * width + 8 * width) + 2 * 2 * tokens**2 * width
    return 2 * (tokens - 1) * pixels * width + layers * block + 2 * width * out


@pytest.mark.slow
def test_a_stored_teacher_costs_nothing(main_run):
    stored = main_run.model_copy(
        update={
            "teachers": main_run.teachers | {"clean": main_run.teachers["clean"].model_copy(update={"stored": True})}
        }
    )
    assert work_of(stored).flops["teachers"] == work_of(main_run).flops["teachers"] / 2
    assert work_of(stored).teacher_forwards == 1


@pytest.mark.slow
def test_the_passes_of_added_terms_are_counted(main_run):
    anchored = settings.load(resources.find_config("vitb32_mmtard"), [*TEACHERS, "terms.anchor.teacher=robust"])
    plain = settings.load(resources.find_config("vitb32_mmtard"), TEACHERS)
    assert work_of(anchored).teacher_forwards == work_of(plain).teacher_forwards + 1
    assert work_of(anchored).flops["teachers"] == 2 * work_of(plain).flops["teachers"]


def test_of_a_student_with_adapters_these_alone_travel_and_are_updated(main_run):
    adapted = main_run.model_copy(update={"student": main_run.student.model_copy(update={"lora": Lora(r=4)})})
    whole, work = work_of(main_run), work_of(adapted)
    assert work.trained < whole.trained / 50 and work.frozen == whole.trained
    stage3 = predict(replace(work, zero_stage=3), PLAIN, 4).parts["ZeRO traffic"]
    gathers = work.trained + work.trained + work.frozen  # the attack's copy; forward and backward
    assert stage3 == pytest.approx((work.trained + gathers) * 4 * 3 / 4 / 8e9)


SMALL = Work(
    images=64, flops={"teachers": 4e9, "attack": 20e9, "student": 6e9}, attack_steps=10, teacher_forwards=1,
    trained=1_000_000, zero_stage=2, gathered=8e6,
)  # fmt: skip
PLAIN = Machine(
    gpus_a_node=4, teachers=1e12, attack=1e12, student=1e12, kernel_s=0, memory_bandwidth=28e9, within=8e9, between=4e9,
    hop_s=1e-3, loaders=1, images_a_core=100, host_s=0.002,
)  # fmt: skip


def test_the_parts_are_those_worked_out_by_hand():
    eight = predict(SMALL, PLAIN, 8).parts  # two nodes, 8 images a GPU
    assert eight == pytest.approx({
        "teachers": 0.032, "attack": 0.16, "student": 0.048,
        "optimiser": 1e6 * 28 / 8 / 28e9,
        "ZeRO traffic": 3 * 7 / 8 * 4e6 / 4e9,  # gradients there and back, and weights, between nodes
        "teacher gathers": 8e6 * 3 / 4 / 8e9,  # within a node alone
        "agreement": 0.007, "host": 0.002,
        "loading": 0.0,  # 0.08 s beside the rest
    })  # fmt: skip
    one = predict(SMALL, PLAIN, 1)
    assert one.parts["ZeRO traffic"] == one.parts["teacher gathers"] == one.parts["agreement"] == 0
    assert one.compute == pytest.approx(64 * 30e9 / 1e12)


@pytest.mark.parametrize("stage, volumes", [(0, 2), (1, 3), (2, 3)])
def test_gradients_are_all_reduced_and_zeros_weights_gathered(stage, volumes):
    seconds = predict(replace(SMALL, zero_stage=stage), PLAIN, 4).parts["ZeRO traffic"]
    assert seconds == pytest.approx(volumes * 3 / 4 * 4e6 / 8e9)


def test_stage_3_gathers_the_weights_for_every_forward():
    stage3 = predict(replace(SMALL, zero_stage=3), PLAIN, 4).parts["ZeRO traffic"]
    assert stage3 == pytest.approx((1 + 10 + 1) * 3 / 4 * 4e6 / 8e9)
    large = replace(SMALL, zero_stage=3, trained=10**9)  # too large to stay for the backward
    assert travelling_weights(large) == (1 + 20 + 2) * 10**9


def test_the_attacks_copy_gathers_the_trained_weights_once_a_step():
    copied = replace(SMALL, zero_stage=3, attack_copy=True)
    assert predict(copied, PLAIN, 4).parts["ZeRO traffic"] == pytest.approx((1 + 1 + 1) * 3 / 4 * 4e6 / 8e9)
    assert travelling_weights(replace(copied, frozen=5)) == 3 * 10**6 + 5


def test_slow_loaders_and_launches_bind_where_they_are_slowest():
    starved = predict(SMALL, replace(PLAIN, images_a_core=1), 8)
    assert starved.parts["loading"] == pytest.approx(8 - sum(starved.parts[n] for n in PARTS if n != "loading"))
    assert "loading" in binds_first([starved], SMALL, replace(PLAIN, images_a_core=1))
    launched = replace(PLAIN, kernel_s=1e-3)
    assert predict(SMALL, launched, 64).parts["attack"] == pytest.approx(10 * 500 * 1e-3)


@pytest.fixture
def train_file(tmp_path):
    """Call with what is otherwise in it: JSON of `bench train` with phases at 320 GFLOP/s, of 8 images a step."""

    def make(name="train.json", **changed):
        own = {
            "phases": [{"teachers": 0.1, "attack": 0.5, "student forward": 0.05, "student backward": 0.1}],
            "flops_an_image": 30e9,
            "flops_by_phase": {"teachers": 4e9, "attack": 20e9, "student": 6e9},
        }
        content = {"config": {"train": {"batch_size": 8}}, "variants": {"mmtard": own}}
        path = tmp_path / name
        path.write_text(json.dumps(content | changed))
        return path

    return make


def test_a_measurement_takes_the_place_of_an_assumption(train_file, tmp_path):
    shared = train_file("two_ranks.json", world_size=2)
    assert measured(Machine(), shared, None).attack == pytest.approx(160e9)  # a rank took half of the batch
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"core": {"as stored": {"images_per_cpu_s": [90.0, 100.0, 300.0]}}}))
    found = measured(Machine(), train_file(), data)
    assert (found.teachers, found.attack, found.student) == pytest.approx((320e9, 320e9, 320e9))
    assert found.images_a_core == 100 and found.within == Machine().within
    with pytest.raises(UserError, match="holds no 'variants'; give the --out of mmtard bench train"):
        measured(Machine(), data, None)


def test_a_phases_rate_is_of_the_files_own_arithmetic(train_file):
    """A file of two teachers that run says the same of each phase, whatever share the predicted run gives to it."""
    own = {
        "phases": [{"teachers": 0.8, "attack": 0.5, "student forward": 0.05, "student backward": 0.1}],
        "flops_by_phase": {"teachers": 32e9, "attack": 20e9, "student": 6e9},
    }
    found = measured(Machine(), train_file(variants={"mmtard": own}), None)
    assert (found.teachers, found.attack, found.student) == pytest.approx((320e9, 320e9, 320e9))
    one_runs = predict(SMALL, replace(found, kernel_s=0), 8).parts  # its only running teacher takes 4 GFLOP an image
    assert one_runs["teachers"] == pytest.approx(8 * 4e9 / 320e9)
    assert one_runs["attack"] == pytest.approx(8 * 20e9 / 320e9)


def test_a_phase_that_the_file_does_not_have_keeps_its_assumption(train_file):
    own = {"phases": [{"attack": 0.5, "student forward": 0.15}],
           "flops_by_phase": {"teachers": 0.0, "attack": 20e9, "student": 6e9}}  # fmt: skip
    found = measured(Machine(), train_file(variants={"mmtard": own}), None)
    assert found.teachers == Machine().teachers and found.attack == pytest.approx(320e9)


def test_a_file_without_flops_of_each_phase_is_refused_with_what_to_do(train_file):
    own = {"phases": [{"attack": 0.5, "student forward": 0.15}], "flops_an_image": 30e9}
    with pytest.raises(
        UserError, match="--train: .* FLOPs of each phase of the variant 'mmtard'; run mmtard bench train again"
    ):
        measured(Machine(), train_file(variants={"mmtard": own}), None)


def test_what_is_measured_is_told_from_what_is_assumed(train_file, tmp_path):
    assumed = Machine().sources()
    assert len(assumed) == 1 and assumed[0].startswith("Assumed, as of A100s: teachers 140 TFLOP/s a GPU, attack")
    assert "300 images/s a core" in assumed[0] and Machine().name == "assumed A100s"
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"core": {"as stored": {"images_per_cpu_s": [100.0]}}}))
    machine = measured(Machine(), train_file(), data).with_measured(tmp_path / "weak.json", {"within": 5e9})
    *found, assumed = machine.sources()
    assert found == [
        "Measured in train.json: teachers 0.32 TFLOP/s a GPU, attack 0.32 TFLOP/s a GPU, student 0.32 TFLOP/s a GPU.",
        "Measured in data.json: 100 images/s a core.",
        "Measured in weak.json: 5 GB/s in a node.",
    ]
    assert assumed.startswith("Assumed, as of A100s: 150 GB/s a node to others") and "a core" not in assumed
    assert machine.name == "GPUs as measured in train.json"


def test_the_bandwidth_is_fitted_to_what_ranks_spent_in_collectives(main_run, work, tmp_path):
    found = tmp_path / "weak.json"
    content = {"config": main_run.model_dump(mode="json"), "communication": {"1": [0.0], "2": [0.3, 0.1, 0.2]}}
    found.write_text(json.dumps(content))
    assert bandwidth_of(found) == pytest.approx(3 * 1 / 2 * 87849216 * 4 / 0.2)  # of three volumes, half
    fitted = predict(work, replace(Machine(), within=bandwidth_of(found)), 2)
    assert fitted.parts["ZeRO traffic"] == pytest.approx(0.2)
    found.write_text(json.dumps({**content, "communication": {"1": [0.0]}}))
    with pytest.raises(UserError, match="has no time of several ranks; measure with --weak 1,2"):
        bandwidth_of(found)
    found.write_text(json.dumps({**content, "communication": {"two": [0.1]}}))
    with pytest.raises(UserError, match="--ranks: .* holds no seconds of collectives"):
        bandwidth_of(found)


def test_the_table_says_that_it_is_a_prediction_and_what_it_assumes(main_run, tmp_path, capsys):
    ScaleBenchmark(main_run, [1, 8, 64]).run(tmp_path / "scale.json")
    printed = capsys.readouterr().out
    assert (
        "PREDICTION, no measurement" in printed and "Binds first: " in printed and "Assumed, as of A100s: " in printed
    )
    content = json.loads((tmp_path / "scale.json").read_text())
    assert content["prediction"].keys() == {"1", "8", "64"}
    speeds = [512 / sum(parts.values()) for parts in content["prediction"].values()]
    assert speeds == sorted(speeds)


def test_a_world_that_the_batch_does_not_divide_over_is_refused(main_run, tmp_path):
    with pytest.raises(UserError, match="64 lanes cannot be shared by 7 ranks"):
        ScaleBenchmark(main_run, [7]).run(tmp_path / "scale.json")


def test_a_measurement_reads_no_file_of_a_prediction(command, tmp_path, capsys):
    for flag in ("--train", "--data", "--ranks"):
        words = ["bench", "scale", "benchmarks/vitb32_vitl14", "--weak", "1,2", flag, tmp_path / "found.json"]
        assert command(*words, "--out", tmp_path / "out.json") == 2
        assert f"{flag}: '{tmp_path / 'found.json'}' is read for a prediction" in capsys.readouterr().err
