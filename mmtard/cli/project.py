"""`mmtard init`: a configuration and a Slurm script of one's own, begun from those that come with mmtard."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from .. import resources
from ..config.yaml_tree import parse
from ..errors import UserError
from ..files import write_text

SCRIPT = "train_vitb32.sh"  # of slurm/
SIZE = "2 nodes of 8 GPUs"  # which that script asks for
_BASE = re.compile(r"^base:.*$", re.MULTILINE)
# The line of the script that hands over to Python, and the words that name no configuration yet.
_HANDS_OVER = re.compile(r'(-m mmtard\.launch\.batch .*\btrain) -- "\$@"')
_HEADER = """\
#!/bin/bash
# Trains on {size}:
#
#   {config}
#
# The job stops itself before its time is up, or when it is preempted, saves its state, goes back to the queue and goes
# on in the same run folder until it is complete.
#
# Write your account and partition into the two lines below, and what your cluster asks for. For another size, change
# --nodes, --gpus-per-node and --ntasks-per-node; on less than a whole node also leave out --exclusive, and ask for less
# memory in --mem. Then, from the folder that the paths of the configuration count from, in a shell where mmtard works:
#
#   sbatch {script} [key=value ...]

"""


def write_project(folder: Path, config: Path) -> list[Path]:
    """Write `config`, the files that it builds on, and a Slurm script into `folder`: their paths, the script last.

    Raises UserError where one of the files is there already, before any is written.
    """
    texts = {folder / path.name: text for path, text in _with_bases(config).items()}
    script, copy = folder / f"{config.stem}.sh", folder / config.name
    texts[copy] = _of_its_copy(texts[copy], config, shlex.quote(str(copy)), shlex.quote(str(script)))
    texts[script] = _script(script, copy)
    for path in texts:
        if path.exists() or path.is_symlink():
            raise UserError(f"'{path}' is there already; choose another folder, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_text(path, text)
        script.chmod(0o755)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}': {error.strerror}; choose another folder") from None
    return list(texts)


def _with_bases(config: Path) -> dict[Path, str]:
    """File -> text of a configuration and all that it builds on, which become neighbours in one folder."""
    texts: dict[Path, str] = {}
    path: Path | None = config
    while path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read configuration '{path}': {error}") from None
        if any(path.name == other.name for other in texts):
            raise UserError(f"'{config}' builds on two files called {path.name}; give them names of their own")
        base = _base_of(text)
        texts[path] = text if base is None else _BASE.sub(lambda _, base=base: f"base: {_yaml(Path(base).name)}", text)
        path = None if base is None else path.parent / base
    return texts


def _base_of(text: str) -> str | None:
    """The file that a configuration builds on; None for one that builds on none, or that cannot be read."""
    try:
        tree = parse(text)
    except ValueError:
        return None  # copied as it is: whoever reads it says what is wrong
    base = tree.get("base") if isinstance(tree, dict) else None
    return base if isinstance(base, str) else None


def _yaml(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else json.dumps(name)


def _of_its_copy(text: str, config: Path, copy: str, script: str) -> str:
    """The text whose commands name the copy: as they stand they would run mmtard's own, whatever the user edits."""
    root, config = resources.folder("configs").resolve(), config.resolve()
    if not config.is_relative_to(root):
        return text
    name = f"configs/{config.relative_to(root)}"
    text = text.replace(f"slurm/{SCRIPT} {name}", script)  # the script written here names its configuration itself
    return text.replace(f"slurm/{SCRIPT}", script).replace(name, copy)


def _script(path: Path, config: Path) -> str:
    text = (resources.folder("slurm") / SCRIPT).read_text(encoding="utf-8")
    settings = text[text.index("#SBATCH --account") :].replace("mmtard-vitb32", f"mmtard-{config.stem}")
    word = shlex.quote(str(config))
    settings, changed = _HANDS_OVER.subn(lambda found: f'{found[1]} {word} -- "$@"', settings)
    if not changed:
        raise UserError(f"slurm/{SCRIPT} of this installation is another version's; install mmtard anew")
    return _HEADER.format(size=SIZE, config=config, script=shlex.quote(str(path))) + settings
