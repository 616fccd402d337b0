"""Work spread over processes, with a progress bar."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..distributed.processes import die_with_parent
from ..errors import UserError


def map_in_processes(function: Callable, items: list, jobs: int | None, title: str, progress: bool) -> list:
    """`[function(item) for item in items]` over `jobs` processes (None: the cores this process may use).

    The first exception stops the work that has not begun and is raised here.
    """
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(items))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        if jobs <= 1:
            return [function(item) for item in bar.track(items, description=title)]
        context = multiprocessing.get_context("fork")
        # Workers of a parent that was killed would wait for ever, and hold the locks that they inherited.
        with ProcessPoolExecutor(
            jobs, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),)
        ) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in bar.track(futures, description=title)]
            except BrokenProcessPool:
                raise UserError(
                    f"{title}: a worker process was killed (out of memory?); use fewer than {jobs} jobs"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
