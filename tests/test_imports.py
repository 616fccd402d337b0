"""Who may import whom. A room that is not in the table, or an import that it does not allow, must be decided here first."""

import ast
import sys
from pathlib import Path

import pytest

from mmtard.config import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmtard"

# A room is a file or a sub-package of mmtard/: the rooms it may import, anywhere in its files.
ROOMS = {
    "errors": set(),
    "views": set(),
    "config": {"errors"},
    # mathematics
    "losses": set(),
    "attacks": set(),
    "weighting": {"errors", "losses"},
    "methods": {"config", "errors", "losses", "weighting"},
    "objectives": {"attacks", "errors", "losses", "methods"},
    "distill": {"attacks", "config", "methods", "objectives"},
    # storage and ranks
    "parallel": {"errors"},
    "checkpoint": {"errors"},
    "preempt": {"errors"},
    "trackers": {"config", "errors"},
    "metrics": {"trackers"},
    "terms": {"parallel"},
    "slurm": set(),
    "lifetime": set(),
    "history": {"config", "errors", "slurm"},
    "watchdog": {"config", "errors", "history", "parallel", "preempt"},
    "run_folder": {"checkpoint", "config", "errors", "history", "parallel", "watchdog"},
    # models
    "lora": {"attacks", "checkpoint", "config", "errors", "views"},
    "towers": {"checkpoint", "config", "errors", "lora", "views"},
    "batch_norm": {"errors", "parallel", "views"},
    "student": {"batch_norm", "checkpoint", "config", "errors", "lora", "parallel", "teachers", "towers"},
    "memory": {"config", "engine", "lora", "methods", "objectives", "student", "teachers", "towers"},
    "heads": {"checkpoint", "errors", "methods", "parallel", "towers"},
    "targets": {"config", "data", "heads", "methods", "parallel", "towers"},
    "teachers": {"config", "data", "methods", "parallel", "towers"},
    "stored": {"config", "data", "errors", "methods", "objectives", "parallel", "towers"},
    "flops": {"config", "methods", "objectives", "towers"},
    "export": {"checkpoint", "config", "errors", "evaluate", "lora", "report", "towers"},
    # data
    "data": {"config", "errors", "lifetime"},
    # engine, and the verbs
    "engine": {"batch_norm", "config", "parallel", "towers"},
    "probe": {"checkpoint", "config", "data", "errors", "evaluate", "lifetime", "metrics", "parallel", "preempt"},
    "alarm": {"config", "data", "distill", "evaluate", "losses", "parallel"},
    "cache": {"config", "data", "engine", "errors", "parallel", "preempt", "stored", "teachers", "towers"},
    "train": {"alarm", "checkpoint", "config", "data", "distill", "engine", "errors", "flops", "history", "metrics", "parallel", "preempt", "probe", "run_folder", "stored", "student", "targets", "teachers", "terms", "towers", "trackers", "watchdog"},
    "evaluate": {"attacks", "config", "data", "errors", "losses", "methods", "parallel", "preempt", "run_folder", "towers"},
    "report": {"config", "data", "errors", "evaluate", "history", "methods", "metrics", "towers"},
    "runs": {"config", "errors", "history", "slurm"},
    "preflight": {"config", "data", "engine", "errors", "parallel", "probe", "run_folder", "stored", "towers"},
    "quickstart": {"config", "data", "errors", "evaluate", "lifetime", "parallel", "towers"},
    "comparison": {"config", "data", "errors", "evaluate", "lifetime", "parallel", "quickstart"},
    "cli": {"cache", "config", "data", "errors", "evaluate", "export", "history", "memory", "parallel", "preempt", "preflight", "report", "runs", "trackers", "train"},
    "__main__": {"cli", "lifetime"},
}
MATHEMATICS = ("losses", "attacks", "weighting", "methods", "objectives", "distill")
LIGHT = ("errors", "config", "slurm", "history", "preempt", "trackers", "lifetime", "cli", "__main__")  # answer a wrong command line before torch is imported
DISTRIBUTED = {"parallel", "teachers", "engine"}  # all that may speak of torch.distributed or DeepSpeed


def files(*rooms):
    paths = [p for room in rooms for p in (PACKAGE / room, PACKAGE / f"{room}.py") if p.exists()]
    assert len(paths) == len(rooms)
    return [f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]


def imports(path, top_level=False):
    """Every module a file imports, dotted and absolute; `from a import b` counts as a.b. top_level: not those inside functions."""
    found, package = set(), path.relative_to(ROOT).with_suffix("").parts[:-1]

    def read(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = [*package[: len(package) - child.level + 1], *(child.module or "").split(".")] if child.level else child.module.split(".")
                found.update(".".join(filter(None, [*base, alias.name])) for alias in child.names)
            elif not (top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
                read(child)

    read(ast.parse(path.read_text()))
    return found


def rooms_of(modules):
    seconds = {m.split(".")[1] for m in modules if m.startswith("mmtard.")}
    return {s for s in seconds if (PACKAGE / s).is_dir() or (PACKAGE / f"{s}.py").is_file()}


def outside(modules, *prefixes):
    """The modules that lie under none of the prefixes."""
    return {m for m in modules if not any(m == p or m.startswith(f"{p}.") for p in prefixes)}


def under(modules, *prefixes):
    return modules - outside(modules, *prefixes)


def test_the_reader_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "mmtard" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b as c\nfrom .. import train\nfrom ..engine import E\nfrom . import y\nfrom .z import f\ndef g():\n    from mmtard import cli\n")
    everywhere = {"a.b", "mmtard.train", "mmtard.engine.E", "mmtard.data.y", "mmtard.data.z.f", "mmtard.cli"}
    assert imports(path) == everywhere and imports(path, top_level=True) == everywhere - {"mmtard.cli"}


def test_every_room_has_its_entry():
    present = {p.stem for p in PACKAGE.iterdir() if (p.suffix == ".py" or (p / "__init__.py").is_file()) and p.name != "__init__.py"}
    assert present == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_it_may(room):
    wrong = {f"{f.relative_to(ROOT)}: {other}" for f in files(room) for other in rooms_of(imports(f)) - ROOMS[room] - {room}}
    assert not wrong


def test_the_table_has_no_cycle():
    done = set()
    while len(done) < len(ROOMS):
        ready = {room for room, needs in ROOMS.items() if room not in done and needs <= done}
        assert ready, f"these import each other: {ROOMS.keys() - done}"
        done |= ready


@pytest.mark.parametrize("path", files(*MATHEMATICS), ids=lambda p: p.name)
def test_mathematics_is_torch_alone(path):
    allowed = ("torch", "math", "typing", "types", "collections.abc", "contextlib", "dataclasses", "importlib", "__future__", "mmtard")
    modules = imports(path)
    assert not outside(modules, *allowed) and not under(modules, "torch.distributed", "torch.utils", "torch.save", "torch.load")


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - DISTRIBUTED))
def test_only_the_engine_rooms_know_torch_distributed(room):
    for path in files(room):
        attributes = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not under(imports(path) | attributes, "torch.distributed", "deepspeed"), path


@pytest.mark.parametrize("path", files(*LIGHT), ids=lambda p: p.name)
def test_the_command_line_needs_no_torch_to_start(path):
    light = ("pydantic", "yaml", "braceexpand", *(f"mmtard.{room}" for room in LIGHT), "mmtard.__version__")
    assert not {m for m in outside(imports(path, top_level=True), *light) if m.split(".")[0] not in sys.stdlib_module_names}


def test_a_login_node_without_torch_can_submit():
    allowed = ("mmtard.config", "mmtard.errors", "mmtard.history", "mmtard.slurm", "mmtard.__version__", "launch", "submitit")
    for path in (ROOT / "launch").glob("*.py"):
        assert not {m for m in outside(imports(path), *allowed) if m.split(".")[0] not in sys.stdlib_module_names}, path


def test_the_loop_names_no_method_and_is_read_in_one_sitting():
    source = (PACKAGE / "train.py").read_text()
    assert len(source.splitlines()) < 250
    tree = ast.parse(source)
    docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            assert not METHODS.keys() & set(node.value.split()), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            # "clean" is also what a run does to its checkpoints
            assert node.attr not in METHODS.keys() - {"clean"}, f"line {node.lineno}"
            assert not (isinstance(node.value, ast.Attribute) and node.value.attr == "method" and node.attr != "name"), f"line {node.lineno}"


def unsafe(tree):
    """Calls that would run what a file or a setting holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                (name == "torch.load" and given.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
                or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads")
                or given.get("shell", "False") != "False"
            ):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("call", ["torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(f)", "run(c, shell=True)", "os.system(c)", "np.load(p, allow_pickle=True)"])
def test_the_reader_sees_every_unsafe_call(call):
    assert len(list(unsafe(ast.parse(call)))) == 1


@pytest.mark.parametrize("folder", ["mmtard", "launch"])
def test_nothing_runs_what_a_file_or_a_setting_holds(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not list(unsafe(ast.parse(path.read_text()))), path
