"""The works of a study on this machine: some side by side, each by a team of processes that takes one after another."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from ..distributed.interruption import EXIT_REQUEUE, Interruption
from ..distributed.progress import WorkProgress
from ..errors import RunError
from ..files import slug
from .loading import FILE
from .plan import Item
from .schema import Study
from .team import Team

LOGS = "logs"


@dataclass
class Crew:
    """The workers of a study. with Crew(...) as crew: crew.do(items) returns when all is done."""

    study: Study
    out: Path
    interruption: Interruption

    def __enter__(self) -> Crew:
        study, file = self.study, self.out / FILE
        self.under_way: list[Item] = []
        self.teams = [Team(file, study.ranks, study.threads) for _ in range(study.at_once)]
        return self

    def __exit__(self, *error) -> None:
        for team in self.teams:
            team.end(10 if error[0] is None else 1)

    def do(self, items: list[Item]) -> None:
        """Train and measure what is missing.

        Raises RunError naming the first that fails, when all others have ended; with status EXIT_REQUEUE where
        this process was asked to stop.
        """
        todo = [item for item in items if not item.done]
        teams = self.teams[: len(todo)]
        free: SimpleQueue[Team] = SimpleQueue()
        for team in teams:
            team.start()  # by this thread: a process dies with the thread that started it
            free.put(team)
        if todo:
            with ThreadPoolExecutor(len(teams)) as pool:
                futures = {pool.submit(self._one, item, free): item for item in todo}
                with WorkProgress() as progress:
                    self._watch(futures, len(items) - len(todo), len(items), progress)

    def _watch(self, futures: dict[Future, Item], done: int, total: int, progress: WorkProgress) -> None:
        left, errors, told = set(futures), [], False
        progress.part("", total, done)
        while left:
            progress.say(_words(self.under_way))
            ended, left = wait(left, timeout=0.3, return_when=FIRST_COMPLETED)
            for future in ended:
                item, (status, message, seconds) = futures[future], future.result()
                if status == 0 and seconds is not None:
                    done += 1
                    progress.advance()
                    print(f"[{done}/{total}] {item.phase}: {item.words}: {seconds:.0f} s")
                elif status and seconds is not None:
                    errors.append((item, status, message))
                if status and not self.interruption:
                    print(f"{item.phase}: {item.words}: failed; its log is '{self.log(item)}'")
            if self.interruption and not told:
                told = True
                print(f"stopped by {self.interruption.name}; the runs under way are being saved")
                for team in self.teams:
                    team.terminate()
        if self.interruption:
            raise RunError(
                f"stopped by {self.interruption.name}; what is done is kept, the same command goes on", EXIT_REQUEUE
            )
        if errors:
            item, status, message = errors[0]
            reason = " ".join(message.split()).rstrip(".") or f"status {status}"
            raise RunError(
                f"{item.words}: {reason}; its log is '{self.log(item)}'. The same command goes on from here",
                status,
            )

    def log(self, item: Item) -> Path:
        """The file that keeps what an item's processes print."""
        return self.out / LOGS / f"{slug(item.asked['name'])}.log"

    def _one(self, item: Item, free: SimpleQueue) -> tuple[int, str, float | None]:
        """(status, message, seconds) of an item; seconds None where it waits, since this process is to stop."""
        team, began = free.get(), time.monotonic()
        self.under_way.append(item)
        try:
            for work in item.works:
                if self.interruption:
                    return 0, "", None
                with suppress(OSError):  # a full disk: what the work itself cannot write says so
                    self.log(item).parent.mkdir(parents=True, exist_ok=True)
                try:
                    status, message = team.ask(work | {"log": str(self.log(item))})
                except OSError as error:
                    status, message = 1, f"its process cannot be started or asked: {error}"
                if status:
                    return status, message, time.monotonic() - began
            return 0, "", time.monotonic() - began
        finally:
            self.under_way.remove(item)
            free.put(team)


def _words(under_way: list[Item]) -> str:
    """What is trained and measured just now: `tuning: tecoa, lr 0.001, seed 0 and 1 more`."""
    first = under_way[:1]
    more = f" and {len(under_way) - 1} more" if len(under_way) > 1 else ""
    return "".join(f"{item.phase}: {item.words}{more}" for item in first)
