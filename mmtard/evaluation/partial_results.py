"""What is measured so far, on disk as soon as it is known: a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import IO

from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import slug

FOLDER = "partial"


class PartialResults:
    """The chunks of one dataset that are done, whichever ranks of whichever start did them.

    A chunk's result is a line of JSON in a file of the process that made it, `OUT/partial/NAME-KEY.*.jsonl`. `key` stands for the
    model, the data and the settings: results of another key are removed, with a line. Collective.
    """

    def __init__(self, out: Path, name: str, key: str, ranks: Ranks, say=print):
        self.folder, self.stem, self.ranks = out / FOLDER, f"{slug(name)}-{key}", ranks
        self.done: dict[tuple[str, int], dict] = ranks.run_on_first(lambda: self._read(slug(name), say))
        self._file: IO | None = None

    def _read(self, name: str, say) -> dict[tuple[str, int], dict]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: cannot write to '{self.folder.parent}': {error.strerror}; choose another folder"
            ) from None
        stale = [
            p
            for p in self.folder.glob(f"{name}-*.jsonl")
            if not p.name.startswith(self.stem) and re.fullmatch(rf"{re.escape(name)}-\w{{16}}\..*", p.name)
        ]
        for path in stale:
            path.unlink()
        if stale:
            say(
                f"{name}: the partial results in '{self.folder}' are of another model, data or settings; they are removed, it starts anew"
            )
        done = {}
        for path in sorted(self.folder.glob(f"{self.stem}.*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill
                done[row["part"], row["chunk"]] = row
        if done:
            say(f"{name}: goes on, {len(done)} chunks are done")
        return done

    def mine(self, part: str, chunks: int) -> tuple[list[int], int]:
        """This rank's chunks of a part that are left, and how many rounds the ranks need for all that are."""
        left = [c for c in range(chunks) if (part, c) not in self.done]
        return left[self.ranks.rank :: self.ranks.world_size], -(-len(left) // self.ranks.world_size)

    def add(self, part: str, chunk: int, row: dict) -> None:
        row = {"part": part, "chunk": chunk, **row}
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)  # the first rank's is another disk's where OUT is not shared
            self._file = (
                self.folder / f"{self.stem}.{self.ranks.rank}-{socket.gethostname()}-{os.getpid()}.jsonl"
            ).open("a")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[part, chunk] = row

    def rows(self, part: str) -> list[dict]:
        """The results of a part's chunks, in their order, on every rank. Collective; all chunks must be done."""
        for done in self.ranks.all_gather({k: v for k, v in self.done.items() if k[0] == part}):
            self.done |= done
        return [self.done[key] for key in sorted(k for k in self.done if k[0] == part)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
