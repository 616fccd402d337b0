"""Who may import whom: one ordered list. What a package may not know is decided here first."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mmtard.config import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmtard"

# A package imports from the rows above its own and from itself: nothing sideways, nothing downwards.
ORDER = [
    ["errors"],
    ["seeding", "losses", "config", "files", "resources", "distributed"],
    ["zero_shot", "attacks", "data", "runs", "folders"],
    ["distillation", "models"],
    ["embeddings", "evaluation"],
    ["training", "report"],
    ["export", "launch", "api", "benchmarks"],
    ["study"],
    ["examples"],
    ["cli"],
    ["__main__"],
]
ROW = {name: row for row, names in enumerate(ORDER) for name in names}
MATHEMATICS = ("losses", "seeding", "zero_shot", "attacks", "distillation")
# These alone may speak of torch.distributed or DeepSpeed.
DISTRIBUTED = {
    f"mmtard/{name}.py"
    for name in (
        "distributed/collectives",
        "distributed/ranks",
        "distributed/meeting",
        "models/teachers",
        "training/engine",
        "training/portable_state",
    )
}
WITHOUT_TORCH = [
    "mmtard",
    "mmtard.config",
    "mmtard.files",
    "mmtard.folders",
    "mmtard.resources",
    "mmtard.distributed.slurm",
    "mmtard.distributed.interruption",
    "mmtard.distributed.processes",
    "mmtard.runs.layout",
    "mmtard.runs.history",
    "mmtard.runs.trackers",
    "mmtard.runs.table",
    "mmtard.data.paths",
    "mmtard.embeddings.settings",
    "mmtard.evaluation.datasets",
    "mmtard.evaluation.protocols",
    "mmtard.evaluation.request",
    "mmtard.study.plan",
    "mmtard.launch.submit",
    "mmtard.launch.job",
    "mmtard.launch.task",
    "mmtard.launch.local",
    "mmtard.launch.batch",
    "mmtard.distributed.launcher",
    "mmtard.cli.main",
    "mmtard.__main__",
]
HEAVY = ("torch", "torchvision", "open_clip", "deepspeed", "webdataset", "numpy", "matplotlib", "PIL")
# A login node may have no more than this beside the standard library.
LOGIN_NODE = ("pydantic", "yaml", "braceexpand", "submitit")


def sources(*names):
    paths = [path for name in names for path in (PACKAGE / name, PACKAGE / f"{name}.py") if path.exists()]
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imports(path):
    """Every module that a file imports, at any depth, dotted and absolute; `from a import b` counts as a.b."""
    found, package = set(), path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = [*package[: len(package) - node.level + 1]] if node.level else []
            base = [*above, *(node.module or "").split(".")]
            found.update(".".join(filter(None, [*base, alias.name])) for alias in node.names)
    return found


def packages_of(modules):
    """The packages (or single files) of mmtard/ that the modules belong to."""
    seconds = {module.split(".")[1] for module in modules if module.startswith("mmtard.")}
    return {name for name in seconds if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def under(modules, *prefixes):
    return {m for m in modules if any(m == p or m.startswith(f"{p}.") for p in prefixes)}


def test_the_reader_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "mmtard" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\nfrom .. import train\nfrom ..engine import E\nfrom . import y\nfrom .z import f\n"
        "def g():\n    from mmtard import cli\n"
    )
    assert imports(path) == {"a.b", "mmtard.train", "mmtard.engine.E", "mmtard.data.y", "mmtard.data.z.f", "mmtard.cli"}


def test_every_package_has_its_place_in_the_order():
    present = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()} - {"__init__"}
    assert present == ROW.keys()


@pytest.mark.parametrize("name", ROW)
def test_a_package_imports_only_from_the_rows_above_it(name):
    wrong = {
        f"{path.relative_to(ROOT)}: {other}"
        for path in sources(name)
        for other in packages_of(imports(path)) - {name}
        if ROW[other] >= ROW[name]
    }
    assert not wrong


def test_contributing_shows_these_rows():
    block = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    shown = [sorted(line.partition("  ")[0].split()) for line in block.strip().splitlines()]
    assert shown == [sorted(names) for names in ORDER if names != ["__main__"]]


def test_no_two_files_of_tests_share_a_name():
    """pytest imports those of a folder without __init__.py by their bare name."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py") if not (p.parent / "__init__.py").is_file()]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_no_public_name_is_also_a_submodule():
    """Importing a module mmtard.train would overwrite the function mmtard.train."""
    import mmtard

    submodules = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert not {name for name in mmtard.__all__ if callable(getattr(mmtard, name))} & submodules


@pytest.mark.parametrize("path", sources(*MATHEMATICS), ids=lambda p: p.name)
def test_mathematics_knows_neither_ranks_nor_files(path):
    modules = imports(path)
    forbidden = ("torch.distributed", "torch.utils", "torch.save", "torch.load", "pathlib", "os", "shutil", "deepspeed")
    assert not under(modules, *forbidden) and "open(" not in path.read_text()


@pytest.mark.parametrize("path", sorted(set(sources(*ROW))), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_engine_and_ranks_know_torch_distributed(path):
    if str(path.relative_to(ROOT)) in DISTRIBUTED:
        return
    tree = parsed(path)
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not under(imports(path) | attributes, "torch.distributed", "deepspeed")


def importing(modules, blocked):
    """A Python in which the `blocked` top-level packages cannot be imported imports these modules."""
    script = (
        "import sys, importlib\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if {blocked}: raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_what_answers_a_command_line_needs_no_torch():
    done = importing(WITHOUT_TORCH, f"name.split('.')[0] in {HEAVY!r}")
    assert done.returncode == 0, done.stderr


def test_a_login_node_without_torch_can_submit():
    allowed = (
        *LOGIN_NODE,
        "mmtard",
        "pydantic_core",
        "typing_extensions",
        "annotated_types",
        "typing_inspection",
        "cloudpickle",
    )
    top = "name.split('.')[0]"
    blocked = f"({top} not in {allowed!r} and {top} not in sys.stdlib_module_names and not name.startswith('_'))"
    done = importing([m for m in WITHOUT_TORCH if m.startswith("mmtard.launch")], blocked)
    assert done.returncode == 0, done.stderr


def test_the_loop_names_no_method_and_is_read_in_one_sitting():
    source = (PACKAGE / "training" / "train.py").read_text()
    assert len(source.splitlines()) < 200
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            assert not METHODS.keys() & set(node.value.split()), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            # "clean" is also what a run does to its checkpoints
            assert node.attr not in METHODS.keys() - {"clean"}, f"line {node.lineno}"
            of_method = isinstance(node.value, ast.Attribute) and node.value.attr == "method"
            assert not (of_method and node.attr != "name"), f"line {node.lineno}"


LOADERS = (
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
)


def unsafe(tree):
    """Calls that would run what a file or a setting holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                (name == "torch.load" and given.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
                or name in LOADERS
                or given.get("shell", "False") != "False"
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(f)",
        "run(c, shell=True)",
        "os.system(c)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_reader_sees_every_unsafe_call(call):
    assert len(list(unsafe(ast.parse(call)))) == 1


@pytest.mark.parametrize("folder", ["mmtard", "launch"])
def test_nothing_runs_what_a_file_or_a_setting_holds(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not list(unsafe(parsed(path))), path


def names_in(path):
    """What an import may take from a file: all that is assigned, defined or imported in it."""
    nodes = list(ast.walk(parsed(path)))
    imported = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    return (
        {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        | {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        | {alias.asname or alias.name.partition(".")[0] for alias in imported}
    )


def test_every_name_that_is_imported_is_there_also_inside_functions():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    known = {module: names_in(path) for module, path in modules.items()}
    for path in modules.values():
        for name in imports(path):
            module, _, attribute = name.rpartition(".")
            assert module not in known or name in modules or attribute in known[module], f"{path.name}: {name}"
