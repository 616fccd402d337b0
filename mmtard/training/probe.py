"""Which checkpoint is measured when: the loop only starts a process and looks whether it has ended.

Results go to `probes.jsonl` and the trackers; the most robust checkpoint stays, as `checkpoints/most_robust`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..config import Config, Data, show_pixels
from ..data.class_names import classnames, templates
from ..data.dataset import open_dataset
from ..distributed.interruption import Interruption
from ..distributed.processes import RANK_VARIABLES
from ..files import discard, read_json_lines, settings_digest
from ..runs.checkpoint_writer import Checkpoints
from ..runs.checkpoints import published
from ..runs.layout import PROBE, PROBES
from ..runs.metrics import MetricLogger
from ..runs.probes import CLASSES, FINGERPRINT, differences

PROCESS = [sys.executable, "-m", "mmtard.training.probe_process"]


def check(config: Config) -> dict[str, str]:
    """What tells the probe's data from others at the same place: fingerprint and digest of the class names.

    Empty without a probe. Raises UserError when the data cannot be read, or lack class names; indexes them when nobody
    has.
    """
    if config.probe is None:
        return {}
    dataset = open_dataset(_source(config))
    names = classnames(_source(config), dataset)
    return {FINGERPRINT: dataset.fingerprint, CLASSES: settings_digest({"classes": names})}


class SilentProbe:
    """The twin of `Probe` on every rank but the first: it takes all calls and does nothing."""

    def after_step(self, step: int) -> None: ...

    def finish(self, complete: bool, interruption: Interruption, alive: Callable[[], None]) -> None: ...


class Probe(SilentProbe):
    """The probes of one run, as its first rank makes them; does nothing where `probe` is null.

    One process at a time measures the newest published checkpoint that is due; older ones follow while no newer one is.
    The next start makes up for what an interruption or a failure ended. The process dies with this one. data: what
    `check` found.
    """

    def __init__(
        self, config: Config, checkpoints: Checkpoints, metrics: MetricLogger, start: int, data: dict[str, str]
    ):
        self.settings, self.steps, self.run = config.probe, config.train.steps, Path(config.run_dir)
        self.checkpoints, self.metrics = checkpoints, metrics
        self.process: subprocess.Popen | None = None
        if self.settings is None:
            return
        eps = self.settings.eps if self.settings.eps is not None else config.attack.eps
        self.source = _source(config)
        # What makes two probes comparable.
        self.protocol = {
            "data": self.source.shards,
            **data,
            "norm": config.attack.norm,
            "eps": show_pixels(eps),
            "steps": self.settings.steps,
            "n_samples": self.settings.n_samples,
            "ema": self.settings.ema,
            "templates": templates(self.source),
        }
        discard(self.run / PROBE)
        earlier = _read(self.run / PROBES)
        self.rows = [row for row in earlier if not differences([row["protocol"]], self.protocol)]
        others = [row["protocol"] for row in earlier if row not in self.rows]
        if others:
            metrics.print(
                f"probes of earlier starts are not compared with this one's, nor chosen from: {len(others)} that "
                f"differ in {', '.join(differences(others, self.protocol))}"
            )
        there, best = {step for step in published(checkpoints.folder) if step <= start}, checkpoints.most_robust
        done = {row["step"] for row in self.rows}
        self.pending = {step for step in there if self._due(step) or step == best} - done
        self._beside: int | None = None  # the best by this protocol, as long as the link is another's
        if best in self.pending:  # it keeps its link, and so stays, until it is measured
            self._beside = self._best()
            if self._beside is not None:
                checkpoints.protect(self._beside)
        else:
            self._keep_best(start)

    def after_step(self, step: int) -> None:
        """Start the probe that is due, and take in one that has ended; `step` updates are done. Never waits."""
        if self.settings is None:
            return
        if self._due(step):
            self.pending.add(step)
        if self.process is not None and self.process.poll() is not None:
            self._conclude()
        if self.process is None:
            self._start_newest()

    def finish(self, complete: bool, interruption: Interruption, alive: Callable[[], None]) -> None:
        """End the probes of this start.

        After a complete run, wait for the last checkpoint's, at most `probe.wait_minutes`, calling `alive` all the
        while. After any other, and at an interruption, leave what is missing to the next start.
        """
        if self.settings is None:
            return
        if self.process is not None and self.process.poll() is not None:
            self._conclude()
        last = max(published(self.checkpoints.folder), default=0)
        self.pending &= {last, self.checkpoints.most_robust} if complete else set()
        until = time.monotonic() + 60 * self.settings.wait_minutes
        while complete and (self.process or self.pending) and not interruption:
            if time.monotonic() > until:
                self.metrics.print(
                    f"the last probe takes more than {self.settings.wait_minutes:g} minutes; "
                    "start the run again to make up for it"
                )
                break
            self.after_step(0)
            alive()
            time.sleep(0.1)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.checkpoints.release(self.step)
        discard(self.run / PROBE)
        self.checkpoints.delete_old()

    def _due(self, step: int) -> bool:
        return step > 0 and (step % self.settings.every == 0 or step == self.steps)

    # ---------------------------------------------------------------- the process

    def _start_newest(self) -> None:
        best = self.checkpoints.most_robust  # of other data: before another takes its place, it is measured on these
        for step in sorted(self.pending, key=lambda step: (step == best, step), reverse=True):
            checkpoint = self.checkpoints.protect(step)
            if checkpoint is not None:
                self.step = step
                try:
                    self._start(checkpoint)
                except OSError as error:  # no space, no memory: nothing that training should end of
                    self._failed(str(error), [])
                # Those gone by now were overtaken; a newer one may be about to be published.
                there = published(self.checkpoints.folder)
                self.pending = {s for s in self.pending if s > step or s in there}
                return

    def _start(self, checkpoint: Path) -> None:
        folder, s = self.run / PROBE, self.settings
        folder.mkdir(exist_ok=True)
        request = {
            **self.protocol,
            "data": self.source.model_dump(mode="json"),
            "checkpoint": str(checkpoint),
            "batch_size": s.batch_size,
            "device": s.device,
        }
        (folder / "asked.json").write_text(json.dumps(request))
        env = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {"OMP_NUM_THREADS": str(s.threads)}
        if s.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""  # torch alone would take some of the GPU's memory
        command = [*PROCESS, str(os.getpid()), str(folder / "asked.json"), str(folder / "results.json")]
        # Blocked signals are inherited: none can end the process before it has said that they are not for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)
        try:
            with (folder / "log").open("wb") as log:
                self.process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _conclude(self) -> None:
        status, self.process = self.process.returncode, None
        try:
            if status:
                raise ValueError(f"exit status {status}")
            found = json.loads((self.run / PROBE / "results.json").read_text())
        except (OSError, ValueError) as error:
            self._failed(str(error), (self.run / PROBE / "log").read_text(errors="replace").splitlines()[-1:])
        else:
            clean, robust = found["clean"]["accuracy"], found["robust"]["accuracy"]
            of = {"interval95": found["robust"]["interval95"], "n": found["robust"]["n"]}
            self.rows.append({"step": self.step, "clean": clean, "robust": robust, **of, "protocol": self.protocol})
            self.metrics.probe(self.rows[-1])
            self._keep_best(self.step)
            self._over()
        (self.run / PROBE / "results.json").unlink(missing_ok=True)

    def _failed(self, reason: str, said: list[str]) -> None:
        self.metrics.event(self.step, "probe failed", reason=reason, said=said)
        self._over()

    def _over(self) -> None:
        self.pending.discard(self.step)
        self.checkpoints.release(self.step)

    def _best(self) -> int | None:
        """The most robust step that is there, of equally robust ones the better on clean images, then the later."""
        there = published(self.checkpoints.folder)
        rows = [(row["robust"], row["clean"], row["step"]) for row in self.rows if row["step"] in there]
        return max(rows)[2] if rows else None

    def _keep_best(self, newest: int) -> None:
        self.checkpoints.keep_most_robust(self._best(), newest)
        if self._beside is not None:
            self.checkpoints.release(self._beside)
            self._beside = None


def _source(config: Config) -> Data:
    """The probe's data with the prompts of the run's."""
    p = config.probe
    shared = {name: getattr(config.data, name) for name in ("max_replaced", "cache", "allow_pipe")}
    shared["templates"] = templates(config.data)
    return Data(shards=p.data, index=p.index, classnames=p.classnames, **shared)


def _read(path: Path) -> list[dict]:
    """The probes of earlier starts; damaged lines are left out."""
    numbers = ("step", "clean", "robust")
    rows = [row for row in read_json_lines(path) if isinstance(row.get("protocol"), dict)]
    return [row for row in rows if all(isinstance(row.get(name), (int, float)) for name in numbers)]
