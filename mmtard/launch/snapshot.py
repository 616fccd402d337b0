"""The folder of a submission: code and configurations as they were, so that no later edit changes a queued job."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from .. import config as settings, resources
from ..errors import UserError
from ..files import slug
from .plan import Plan, Work


class Snapshot:
    """`RUN/submissions/TIME/`: `code/`, one YAML a training, `submission.json`, and `jobs/`.

    submitit keeps its own files, and the logs, in `jobs/`.
    """

    def __init__(self, run: Path):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        taken = (f"{stamp}-{i}" if i else stamp for i in range(1000))
        self.folder = next(f for f in ((run / "submissions" / name).absolute() for name in taken) if not f.exists())
        self.code, self.jobs = self.folder / "code", self.folder / "jobs"

    def refuse_patterns(self) -> None:
        """Raise UserError for a name that Slurm and submitit would not take as it is, where the logs are."""
        for character in "%\\":
            if character in str(self.folder):
                raise UserError(
                    f"run_dir: '{self.folder.parents[1]}' holds '{character}', which Slurm takes for a pattern in the "
                    "path of a log; choose a folder without it"
                )

    def words(self, work: Work) -> tuple[str, ...]:
        """The arguments of mmtard for a work, with its configuration as the file in this folder."""
        return (*work.words, str(self._yaml(work))) if work.config else work.words

    def write(self, plan: Plan) -> None:
        """Copy mmtard/ and configs/, write the resolved configurations and where they came from."""
        try:
            self.jobs.mkdir(parents=True)
            for source, name in ((resources.PACKAGE, "mmtard"), (resources.folder("configs"), "configs")):
                shutil.copytree(source, self.code / name, ignore=shutil.ignore_patterns("__pycache__"))
            for work in (work for stage in plan.stages for work in stage.works if work.config):
                self._yaml(work).write_text(settings.dump(work.config), encoding="utf-8")
            origin = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": sys.argv,
                "directory": str(Path.cwd()),
                "git": resources.git_state(),
            }
            (self.folder / "submission.json").write_text(json.dumps(origin, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"run_dir: cannot write to '{self.folder}': {error.strerror}; choose another folder"
            ) from None

    def remove(self) -> None:
        """Remove the folder of a submission that came to nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _yaml(self, work: Work) -> Path:
        return self.folder / f"{slug(str(work.run_dir).strip('/'))}.yaml"
