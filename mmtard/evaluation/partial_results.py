"""What is measured so far, on disk as soon as it is known: a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
import re
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..distributed.ranks import Ranks
from ..errors import RunError, UserError
from ..files import read_json_lines, slug
from .graphs import Graphs, all_compiled

FOLDER = "partial"
CHECKSUM = "crc32"
MEMORY = ".safetensors"
# DATASET-KEY.RANK-HOST-PROCESS.jsonl, and DATASET-KEY.PART.SAMPLE.safetensors of attacks that were left in the middle
_OWN_FILE = re.compile(rf".+-[0-9a-f]{{16}}\.(\d+-.+-\d+\.jsonl|.+\.\d+{re.escape(MEMORY)})")


class PartialResults:
    """The chunks of one dataset that are done, whichever ranks of whichever start did them.

    A part is the clean pass, or one attack at one radius. A chunk's result is a line of JSON in a file of the
    process that made it, `OUT/partial/NAME-KEY.*.jsonl`, with a checksum: a line that is cut off or damaged is measured
    again. `key` stands for the model, the data and the
    settings: results of another key are removed, with a line. graphs: where they are asked for, each line says whether
    they computed its chunk. Collective.
    """

    def __init__(self, out: Path, name: str, key: str, ranks: Ranks, say=print, graphs: Graphs | None = None):
        self.folder, self.stem, self.ranks, self.graphs = out / FOLDER, f"{slug(name)}-{key}", ranks, graphs
        self.done: dict[tuple[str, int], dict] = ranks.run_on_first(lambda: self._read(slug(name), say))
        self._file: IO | None = None

    def _read(self, name: str, say) -> dict[tuple[str, int], dict]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            of_dataset = _files_of(self.folder, name)
            stale = [path for path in of_dataset if not path.name.startswith(f"{self.stem}.")]
            for path in stale:
                path.unlink()
            fresh = [path for path in of_dataset if path not in stale and path.suffix != MEMORY]
            lines = [row for path in fresh for row in read_json_lines(path)]
        except OSError as error:
            raise UserError(
                f"--out: cannot work in '{self.folder}': {error.strerror or error}; choose another folder"
            ) from None
        if stale:
            say(
                f"{name}: the partial results in '{self.folder}' are of another model, data or settings; "
                "they are removed, it starts anew"
            )
        done = {(row["part"], row["chunk"]): row for row in lines if row.pop(CHECKSUM, None) == _checksum(row)}
        if done:
            say(f"{name}: goes on, {len(done)} chunks are done")
        if len(done) < len(lines):
            say(f"{name}: {len(lines) - len(done)} damaged lines in '{self.folder}' are measured again")
        return done

    def mine(self, part: str, chunks: int) -> tuple[list[int], int]:
        """This rank's chunks of a part that are left, and how many rounds the ranks need for all that are."""
        left = [c for c in range(chunks) if (part, c) not in self.done]
        return left[self.ranks.rank :: self.ranks.world_size], -(-len(left) // self.ranks.world_size)

    def keep_fitting(self, part: str, chunks: Sequence[np.ndarray]) -> None:
        """Forget what is kept of a part for other samples than those of its chunks: it will be measured again."""
        for key in [key for key in self.done if key[0] == part]:
            row, ids = self.done[key], set(chunks[key[1]].tolist()) if key[1] < len(chunks) else set()
            if not set(row["ids"]) <= ids or len(row["ids"]) + len(row["left_out"]) != len(ids):
                del self.done[key]

    def memory_file(self, part: str, ids: Sequence[int]) -> Path:
        """Where the attack of a chunk of these samples keeps how far it is."""
        return self.folder / f"{self.stem}.{slug(part)}.{ids[0]}{MEMORY}"

    def add(self, part: str, chunk: int, row: dict) -> None:
        """Keep a chunk's result, on disk first. Raises RunError where it cannot be written, naming the disk."""
        row = {"part": part, "chunk": chunk, **row}
        if self.graphs:
            row["compiled"] = self.graphs.end_chunk()
        try:
            if self._file is None:
                # The first rank's folder is on another disk where OUT is not shared.
                self.folder.mkdir(parents=True, exist_ok=True)
                own = f"{self.stem}.{self.ranks.rank}-{socket.gethostname()}-{os.getpid()}.jsonl"
                self._file = (self.folder / own).open("a")
            self._file.write(json.dumps(row | {CHECKSUM: _checksum(row)}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.abandon()
            raise RunError(
                f"--out: cannot write to '{self.folder}': {error.strerror or error}; "
                "free space there and start it again: what is measured is kept"
            ) from None
        self.done[part, chunk] = row
        if row.get("ids"):
            self.memory_file(part, row["ids"]).unlink(missing_ok=True)

    def rows(self, part: str) -> list[dict]:
        """The results of a part's chunks, in their order, on every rank. Collective; all chunks must be done."""
        for done in self.ranks.all_gather({k: v for k, v in self.done.items() if k[0] == part}):
            self.done |= done
        return [self.done[key] for key in sorted(k for k in self.done if k[0] == part)]

    @property
    def compiled(self) -> bool | None:
        """Whether graphs computed all chunks, as `all_compiled` says it; no chunk whose line does not say so."""
        return all_compiled(row.get("compiled", False) for row in self.done.values())

    def abandon(self) -> None:
        """Close the file without writing what its buffer still holds, which the disk did not take."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                pass  # told already, by the write that failed

    def close(self) -> None:
        """Close the file; what it holds stays, for a start that goes on."""
        if self._file is not None:
            self._file.close()


def own_files(folder: Path) -> list[Path]:
    """The files of partial results in a folder, sorted. Whatever else lies there is not mmtard's and is left alone."""
    return sorted(path for path in folder.glob("*") if path.is_file() and _OWN_FILE.fullmatch(path.name))


def _files_of(folder: Path, stem: str) -> list[Path]:
    """The files of one dataset, under whatever key."""
    return [path for path in own_files(folder) if re.fullmatch(rf"{re.escape(stem)}-\w{{16}}\..*", path.name)]


def remove(out: Path, names: Sequence[str]) -> None:
    """Remove the partial results of datasets that are published; those of others stay, for who goes on with them."""
    for name in names:
        for path in _files_of(out / FOLDER, slug(name)):
            path.unlink(missing_ok=True)


def _checksum(row: dict) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())
