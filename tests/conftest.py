"""A small valid configuration, and open_clip models of a few thousand weights, for the tests of every folder."""

import json
import os
import signal

import pytest
import yaml
from processes import only_rank
from warm_python import WarmPython

# torch.compile, which DeepSpeed names and no test compiles with, would import a compiler in every process: a second
# of each launch.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

WORDS = ["a", "photo", "of", "cat", "dog", "cow", "red", "square"]


ON_SLURM = ("tests/slurm/", "tests/launch/test_running.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Between several workers (pytest-xdist), the tests of a file stay together with what they share, and those on
    Slurm with its cluster.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "Slurm" if nodeid.startswith(ON_SLURM) else nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """What is on Slurm begins, since it mostly waits, then what takes longest."""
    long = ("tests/parallel/", "tests/study/", "tests/models/test_architectures.py", "tests/test_lint.py")
    items.sort(key=lambda item: 0 if item.nodeid.startswith(ON_SLURM) else 1 if item.nodeid.startswith(long) else 2)


@pytest.fixture
def tree(tmp_path):
    """A valid configuration as YAML reads it: 4 lanes, batches of 8, two shards that exist."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("000000.tar", "000001.tar"):
        (shards / name).touch()
    model = {"arch": "ViT-B-32", "weights": "openai"}
    return {
        "run_dir": str(tmp_path / "run"),
        "student": dict(model),
        "teachers": {"clean": dict(model), "robust": {**model, "weights": "robust.pt"}},
        "method": {"name": "mmtard"},
        "data": {"shards": str(shards), "lanes": 4},
        "train": {"steps": 10, "batch_size": 8},
    }


@pytest.fixture
def write(tmp_path):
    """Call with a dict (or text) and a name: the path of that YAML file."""

    def make(content, name="run.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return make


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """A `python` that has done the program's imports, without torch."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    yield python.path
    python.end()


@pytest.fixture
def quick_figures(monkeypatch):
    """PNGs alone: the other formats take most of the time."""
    monkeypatch.setattr("mmtard.report.style.VECTOR", {})


@pytest.fixture
def ranks():
    """A group of this process alone."""
    with only_rank() as ranks:
        yield ranks


@pytest.fixture
def command(ranks):
    """Call with the words of a command line: its exit status, from this process, whose signals and environment are
    put back.
    """
    from mmtard.cli.main import main
    from mmtard.distributed.interruption import Interruption

    before = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    yield lambda *words: main([str(word) for word in words])
    for number, handler in before.items():
        signal.signal(number, handler)


def _arch(folder, name, vision):
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """Model config of a 2-block ViT on 16 px images."""
    return _arch(
        tmp_path_factory.mktemp("arch"),
        "tests-vit",
        {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    )


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    """Model config of CLIP's ModifiedResNet (batch norm, attention pooling) on 32 px images."""
    return _arch(
        tmp_path_factory.mktemp("arch"),
        "tests-resnet",
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    )


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """Folder of a Hugging Face tokenizer of whole words: 0 pads, 1 is every unknown word, then those of `WORDS`."""
    tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder
