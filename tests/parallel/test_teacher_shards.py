"""A sharded teacher on several nodes: each node holds all of it, and no block of it crosses the network."""

import pytest
import torch

from .launch import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four ranks, on two nodes, got of a teacher that is replicated, sharded in its node, or over all."""
    folder = tmp_path_factory.mktemp("nodes")
    run_ranks([__file__.replace("test_teacher_shards", "two_nodes"), folder / "out.pt"], 4, folder, "ranks")
    return torch.load(folder / "out.pt", weights_only=True)


def test_predictions_and_gradients_have_the_same_bits(found):
    for of_rank in found:
        assert of_rank["a node"] == 2
        for kind in ("nodes", "flat"):
            for what in ("logits", "gradient"):
                assert of_rank[kind][what].equal(of_rank["replicated"][what]), (kind, what)


def test_compiled_block_by_block_a_sharded_teacher_is_the_same_function(found):
    """Two kinds of blocks (the last one computes the class token alone), with and without gradient: four graphs."""
    for of_rank in found:
        for what in ("logits", "gradient"):
            assert torch.allclose(of_rank["compiled"][what], of_rank["replicated"][what], rtol=1e-4, atol=1e-6), what
        assert of_rank["compiled"]["all"] == of_rank["nodes"]["all"] and of_rank["compiled"]["held"] < 0.53
        assert of_rank["compiler"] == {"said": [], "graphs": 4, "breaks": {}}


def test_nothing_is_gathered_from_another_node(found):
    for of_rank in found:
        nodes, flat = of_rank["nodes"], of_rank["flat"]
        assert nodes["of other nodes"] == 0 and of_rank["replicated"]["all"] == 0
        assert flat["of other nodes"] * 2 == flat["all"] > 0, "half of each block came from the other node"
        assert nodes["all"] <= flat["all"], "a tower is padded to fewer ranks"


def test_a_rank_holds_its_share_of_its_node(found):
    for of_rank in found:
        assert of_rank["replicated"]["held"] == 1
        assert of_rank["nodes"]["held"] == pytest.approx(1 / 2, abs=0.02)
        assert of_rank["flat"]["held"] == pytest.approx(1 / 4, abs=0.06)
