"""The schema as a whole: every setting is described, and what is decided once is asked once."""

import pytest

from mmtard import config
from mmtard.config import Config
from mmtard.config.data import default_lanes
from mmtard.config.values import Section


def sections(section=Config):
    """Every class of settings that a configuration may hold."""
    found = {section, *config.METHODS.values()}
    for field in section.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Section) and part not in found:
                found |= sections(part)
    return found


@pytest.mark.parametrize("section", sorted(sections(), key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_every_setting_is_described(section):
    described = {name for name, field in section.model_fields.items() if field.description}
    whole_sections = {
        name
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    # A method's name is described by its class, as a section is.
    assert section.model_fields.keys() - described <= whole_sections | {"name", "method"}
    assert section.__doc__ and section.__doc__ != Section.__doc__


def test_the_reader_of_sections_sees_them_all():
    assert {"Config", "Cache", "WandB", "Probe", "Lora", "Teacher", "Student", "MMTARD"} <= {
        s.__name__ for s in sections()
    }


@pytest.mark.parametrize(
    "teachers, start_is_the_student",
    [("{}", True), ("{start: {placement: sharded}}", True), ("{start: {weights: openai, arch: ViT-L-14}}", False)],
)
def test_a_teacher_start_is_the_untouched_student_unless_it_has_weights_of_its_own(
    tree, write, teachers, start_is_the_student
):
    c = config.load(write(tree), ["method={name: fare}", f"teachers={teachers}"])
    assert (c.model_of("start") is c.student) is start_is_the_student
    stored = c.ensemble["start"].weights == f"{c.run_dir}/start"
    assert stored is start_is_the_student
    if not start_is_the_student:
        assert c.model_of("start") is c.teachers["start"]


def test_a_teacher_of_another_name_is_its_own_setting(tree, write):
    c = config.load(write(tree))
    assert c.model_of("robust") is c.teachers["robust"]


@pytest.mark.parametrize(
    "batch, lanes",
    [
        (64, 64),
        (512, 64),
        (8192, 64),
        (1, 1),
        (8, 8),
        (96, 96),
        (100, 100),
        (72, 72),
        (1000, 200),
        (1009, 1),
        (1056, 352),
    ],
)
def test_lanes_left_out_follow_from_the_batch_alone(tree, write, batch, lanes):
    tree["data"].pop("lanes")
    assert default_lanes(batch) == lanes and batch % lanes == 0
    assert config.load(write(tree), [f"train.batch_size={batch}"]).data.lanes == lanes


@pytest.mark.parametrize("batch", [8, 24, 72, 96, 100, 160, 320, 1000, 4096])
@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
def test_lanes_left_out_fit_every_power_of_two_of_ranks_that_shares_the_batch(tree, write, batch, world):
    tree["data"].pop("lanes")
    if batch % world == 0:
        assert config.check_world(config.load(write(tree), [f"train.batch_size={batch}"]), world) == 1


def test_lanes_that_are_given_stay_and_those_chosen_are_stored_with_the_run(tree, write):
    path = write(tree)
    assert config.load(path, ["train.batch_size=512"]).data.lanes == 4
    chosen = config.load(path, ["data.lanes=null"])
    assert "lanes: 8" in config.dump(chosen) and config.differences(chosen, config.load(path, ["data.lanes=8"])) == {}


def test_a_teacher_that_no_part_uses_is_told_with_the_words_that_drop_it(tree, write):
    path = write(tree)
    with pytest.raises(config.loading.UserError, match=r"\(used: none\), in the file or with teachers=null$"):
        config.load(path, ["method.name=tecoa"])
    with pytest.raises(config.loading.UserError, match=r"\(used: robust\), in the file or with teachers.clean=null$"):
        config.load(path, ["method.name=rslad"])
    assert config.load(path, ["method.name=tecoa", "teachers=null"]).teachers == {}
    assert list(config.load(path, ["method.name=rslad", "teachers.clean=null"]).teachers) == ["robust"]
