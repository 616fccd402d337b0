"""Compiled forwards: one graph a shape, never a second in silence, and none where it cannot be made."""

import os
import subprocess
import sys

import pytest
import torch
from compiling import graphs_without_cpp
from processes import python_path

from mmtard.config import Model
from mmtard.models import compiled, image_tower, loading
from mmtard.models.attack_copy import frozen_twin

X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tower(vit):
    return loading.load_clip(Model(arch=vit, weights="random"), seed=3).tower().eval()


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile was asked to run, by shape."""

    class Ran(list):
        dynamic = None

    ran = Ran()

    def compile(function, **settings):
        assert settings["mode"] is None
        ran.dynamic = settings["dynamic"]

        def run(images, tokens):
            ran.append(list(images.shape))
            return function(images, tokens)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return ran


def test_images_of_another_shape_run_uncompiled_and_that_is_said_once(tower, graphs):
    said, expected = [], tower(X)
    compiled.compile_tower(tower, "the student", said.append)
    for batch in (X, X[:3], X[:3], X):
        assert torch.allclose(tower(batch), expected[: len(batch)], atol=1e-6)
    assert graphs == [[4, 3, 16, 16]] * 2 and graphs.dynamic is False and tower.graph.ran == {True, False}
    assert said == ["the student: compiled for images [4, 3, 16, 16]; those of [3, 3, 16, 16] run uncompiled"]


def test_one_graph_may_be_for_batches_of_any_size_but_a_single_image(tower, graphs):
    said, expected = [], tower(X)
    compiled.compile_tower(tower, "the model", said.append, any_batch=True)
    for batch in (X, X[:3], X[:1], X[:2]):
        assert torch.allclose(tower(batch), expected[: len(batch)], atol=1e-6)
    assert graphs == [[n, 3, 16, 16] for n in (4, 3, 2)] and graphs.dynamic is None and said == []
    assert tower.graph.ran == {True}, "a single image is nothing that a graph is for"
    tower(torch.rand(4, 3, 20, 20))
    assert tower.graph.ran == {True, False}
    assert said == ["the model: compiled for images [3, 16, 16]; those of [3, 20, 20] run uncompiled"]


def test_with_and_without_gradient_are_two_graphs_each_with_its_shape(tower, graphs):
    said = []
    compiled.compile_tower(tower, "the student", said.append)
    tower(X)
    with torch.no_grad():
        tower(X[:2])
        tower(X[:2], tokens=True)
    assert len(graphs) == 3 and said == []


def test_a_compiler_that_is_missing_is_said_once_and_all_goes_on(tower, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def broken(*args):
        raise TorchDynamoException("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda function, **settings: broken)
    said, expected = [], tower(X)
    compiled.compile_tower(tower, "teacher clean", said.append)
    assert tower(X).equal(expected) and tower(X).equal(expected) and tower.graph.ran == {False}
    assert said == ["teacher clean runs uncompiled: TorchDynamoException: no C++ compiler found"]


def test_blocks_are_compiled_at_one_shape_and_run_without_at_others(tower, monkeypatch):
    ran, said, expected = [], [], tower(X)

    def compile(function, **settings):
        return lambda x, *args, **kwargs: ran.append(len(x)) or function(x, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    compiled.compile_blocks(tower, "teacher clean", said.append)
    for batch in (X, X[:3], X):
        assert torch.allclose(tower(batch), expected[: len(batch)], atol=1e-6)
    assert len(ran) == 2 * len(image_tower.blocks(tower)) and {*ran} == {4}
    assert said == ["teacher clean: compiled for images [4, 3, 16, 16]; those of [3, 3, 16, 16] run uncompiled"]


def test_a_block_that_cannot_be_compiled_goes_on_itself_and_none_is_run_twice(tower, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    tried, said, expected = [], [], tower(X)

    def broken(*args, **kwargs):
        tried.append(1)
        raise TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **settings: broken)
    ran = []
    for block in image_tower.blocks(tower):
        block.register_forward_pre_hook(lambda block, args: ran.append(block))
    compiled.compile_blocks(tower, "teacher clean", said.append)
    assert tower(X).equal(expected) and tower(X).equal(expected) and tower.graph.ran == {False}
    assert said == ["teacher clean runs uncompiled: TorchDynamoException: no C++ compiler"]
    assert len(tried) == 1 and len(ran) == 2 * len(image_tower.blocks(tower))


def test_a_sharded_tower_without_blocks_is_said_to_run_uncompiled(tower, monkeypatch):
    said = []
    monkeypatch.setattr(compiled, "blocks", lambda tower: [])
    compiled.compile_blocks(tower, "teacher clean", said.append)
    assert tower.graph is None and said[0].startswith("teacher clean is sharded as a whole")


def test_an_error_of_the_model_itself_is_no_compilers(tower, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **settings: full)
    compiled.compile_tower(tower, "the student", print)
    with pytest.raises(torch.OutOfMemoryError):
        tower(X)


def test_what_a_replayed_graph_returns_is_copied_out_of_its_memory(tower, monkeypatch):
    """A CUDA graph writes its outputs, and the gradient to its input, over those of the call before."""
    memory = torch.zeros(4, 16)

    def replay(images, tokens):
        memory.copy_(images.detach().flatten(1)[:, :16])
        return memory.view(4, 16)

    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: modes.append(settings["mode"]) or replay)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    compiled.compile_tower(tower, "the attack's student", print, graphs=True)
    first = tower(X)
    kept = first.clone()
    tower(1 - X)
    assert first.equal(kept) and modes == ["reduce-overhead"]


@pytest.mark.parametrize(
    "setting, device, wanted",
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("on", "cpu", True),
        ("graphs", "cuda", True),
        ("off", "cuda", False),
    ],
)
def test_auto_compiles_on_gpus(setting, device, wanted):
    assert compiled.wants_compiling(setting, torch.device(device)) is wanted


WITHOUT_A_COMPILER = """
import sys, torch
from mmtard.config import Model
from mmtard.models import compiled, loading
from mmtard.models.attack_copy import frozen_twin
tower, said = frozen_twin(loading.load_clip(Model(arch=sys.argv[1], weights="random"), seed=3).tower().eval()), []
x = torch.rand(4, 3, 16, 16, requires_grad=True)
plain = torch.autograd.grad(tower(x).square().sum(), x)[0]
for any_batch in (False, True):
    torch._dynamo.reset()
    compiled.compile_tower(tower, "the model", said.append, any_batch=any_batch)
    for _ in range(2):
        assert torch.autograd.grad(tower(x).square().sum(), x)[0].equal(plain)
print(*said, sep="\\n")
"""


@pytest.mark.slow  # a process that imports the compiler
def test_a_real_compiler_that_finds_no_cxx_is_said_once_and_all_goes_on(vit, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    env |= {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": python_path()}
    words = [sys.executable, "-c", WITHOUT_A_COMPILER, vit]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2 and all(line.startswith("the model runs uncompiled: ") for line in said), said
    assert all("compiler" in line for line in said), said


@pytest.fixture
def compiling():
    with graphs_without_cpp() as counters:
        yield counters


@pytest.mark.slow  # it imports the compiler
def test_a_frozen_towers_graph_gives_its_embeddings_and_the_gradient_to_the_images(tower, compiling):
    twin, found = frozen_twin(tower), []
    for compile in (False, True):
        if compile:
            compiled.compile_tower(twin, "the attack's student", found.append)
        for _ in range(2):
            x = X.clone().requires_grad_()
            z = twin(x)
            found.append((z.detach(), torch.autograd.grad(z.square().sum(), x)[0]))
    for z, gradient in found[1:]:
        assert torch.allclose(z, found[0][0], atol=1e-6) and torch.allclose(gradient, found[0][1], atol=1e-6)
    assert compiling["stats"]["unique_graphs"] == 1 and not compiling["graph_break"]


@pytest.mark.slow  # it imports the compiler
def test_batches_that_shrink_are_computed_by_the_graphs_that_are_there(tower, compiling):
    twin, said = frozen_twin(tower), []
    expected = twin(X)
    compiled.compile_tower(twin, "the model", said.append, any_batch=True)
    for gradient in (False, True):
        for n in (4, 3, 2, 4, 1):
            with torch.set_grad_enabled(gradient):
                x = X[:n].clone().requires_grad_(gradient)
                z = twin(x)
            assert torch.allclose(z, expected[:n], atol=1e-6)
    # On a CPU what asks a ViT for no gradient is computed without a graph.
    assert compiling["stats"]["unique_graphs"] == 1 and not compiling["graph_break"] and said == []


@pytest.mark.slow  # it imports the compiler
def test_a_convolutional_towers_forward_is_a_graph_where_no_gradient_is_asked_for(resnet, compiling):
    tower, said = loading.load_clip(Model(arch=resnet, weights="random"), seed=3).tower().eval(), []
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(images)
        compiled.compile_tower(tower, "the model", said.append, any_batch=True)
        for n in (4, 3, 2, 4, 1):
            assert torch.allclose(tower(images[:n]), expected[:n], atol=1e-6)
    assert compiling["stats"]["unique_graphs"] == 1 and not compiling["graph_break"] and said == []


class Scaled:
    """In a tower's place: images -> images * by."""

    by = 2

    def compute(self, images, tokens):
        return images * self.by


def of(tower, said):
    """The tower's compiled forward."""
    compiled.compile_tower(tower, "the model", said.append)
    return tower.graph


@pytest.mark.slow  # it imports the compiler
def test_a_way_that_is_compiled_again_at_its_shape_is_said_once(compiling):
    said, tower = [], Scaled()
    forward = of(tower, said)
    for tower.by in (2, 2, 3, 4):
        assert forward(X).equal(X * tower.by)
        assert len(said) == (tower.by > 2)
    assert said == ["the model was compiled again, which costs time: see why with TORCH_LOGS=recompiles"]


@pytest.mark.slow  # it imports the compiler
def test_towers_may_have_more_graphs_together_than_torch_lets_a_function_have(compiling, monkeypatch):
    """By default it stops at 8, in silence. What is one too many of ours is said, and the tower runs without."""
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 10)
    said = []
    for n in range(1, 12):
        images = torch.rand(n, 3, 2, 2)
        assert of(Scaled(), said)(images).equal(images * 2)
        assert compiling["stats"]["unique_graphs"] == min(n, 10)
    assert len(said) == 1 and said[0].startswith("the model runs uncompiled: FailOnRecompileLimitHit: ")
