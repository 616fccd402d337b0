"""A `python` that has done the program's imports, which take longer than most of its commands.

A small script stands for it. What it is called with goes on in a fork of a process that has the imports: with the
script's words, folder, environment (PYTHONPATH and sitecustomize included), output and exit status.
"""

import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

MODULES = ("mmtard.cli.main", "mmtard.launch.submit", "mmtard.launch.batch")
# Its own input and output stay what they were, for they are the fork's.
SCRIPT = """#!{bash}
{mkfifo} "{folder}/$$" && (echo $$ >"{folder}/asked") && read -r -u 3 status 3<"{folder}/$$"
case $status in -*) kill "$status" $$ ;; esac
exit "$status"
"""


class WarmPython:
    """The script `path` in a folder, and the process that its calls are forks of. `end` ends it."""

    def __init__(self, folder: Path):
        self.path = folder / "python"
        os.mkfifo(folder / "asked")
        programs = {name: shutil.which(name) for name in ("bash", "mkfifo")}
        self.path.write_text(SCRIPT.format(folder=folder, **programs))
        self.path.chmod(0o755)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        assert self._server.stdout.readline(), "it ended before all was imported"

    def end(self) -> None:
        self._server.communicate()


def serve(folder: Path) -> None:
    """Fork for every process id that is written into `asked`, until the tests have ended."""
    for module in MODULES:
        importlib.import_module(module)
    print("ready", flush=True)
    gc.freeze()  # what is there stays shared
    asked = os.open(folder / "asked", os.O_RDWR)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while True:
        ready, _, _ = select.select([asked, 0], [], [])
        if 0 in ready:
            return
        for pid in os.read(asked, 4096).split():
            if not os.fork():
                return answer(folder / pid.decode())


def answer(fifo: Path) -> None:
    """Go on as the script of this process id; another process waits for that, and hands it the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        return become(Path("/proc", fifo.name))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    fifo.write_text(f"{status}\n")
    fifo.unlink()
    os._exit(0)


def become(script: Path) -> None:
    """Go on as `python WORDS` in the place of the script. What is raised ends this process, as any Python."""
    _, _, *words = (script / "cmdline").read_bytes().decode().split("\0")[:-1]
    variables = (script / "environ").read_bytes().decode().split("\0")[:-1]
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(script / "fd" / str(number), flags), number)
    os.chdir(script / "cwd")
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(variable.split("=", 1) for variable in variables)
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = ["" if words[0] == "-m" else str(Path(words[0]).parent), *folders]
    for site in (Path(folder, "sitecustomize.py") for folder in folders):
        if site.is_file():
            runpy.run_path(str(site))
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # the program itself begins anew
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
