"""YAML that a stranger wrote takes no longer than its length, and says what is wrong with it."""

import time

import pytest
import yaml

from mmtard import config
from mmtard.config import yaml_tree
from mmtard.errors import UserError

# Each section merges the one before it twice: 2**40 keys.
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "content, words",
    [
        ("train: {lr: 1, lr: 2}\n", "not valid YAML|key 'lr' stands there twice"),
        (MERGED, "not valid YAML|it has more than 100,000 keys, with those of its `<<`"),
    ],
)
def test_a_file_that_cannot_be_laid_out_is_refused(write, content, words):
    with pytest.raises(UserError) as error:
        config.load(write(content))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words.split("|")), error.value


def test_a_long_configuration_takes_a_time_that_grows_with_its_length():
    """200,000 keys, compared each with each, took minutes."""
    node = yaml.compose("".join(f"k{i}: 1\n" for i in range(1000)))
    node.value = [(yaml.ScalarNode("!", f"{n}-{key.value}"), value) for n in range(200) for key, value in node.value]
    began = time.process_time()
    yaml_tree._refuse_twins(node)
    assert time.process_time() - began < 2


def test_a_key_that_a_merge_brings_may_be_set_anew_at_any_depth():
    assert yaml_tree.parse("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\n<<: *b") == {"a": {"x": 1}, "b": {"x": 2}, "x": 2}
