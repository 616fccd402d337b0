"""Output that outlives its terminal or pipe: what closes it ends no work."""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO)  # what a closed pipe and a terminal that is gone answer


class LastingStream:
    """A text stream that drops what is written once its other end is closed (`| head`, a terminal that is gone).

    The file descriptor then leads to /dev/null, so that libraries and child processes meet no closed pipe either. What
    cannot be written for another reason, such as a full disk, is dropped, too, and `failure` keeps the reason.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.closed_by_reader = False
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, in ASCII escapes what the locale cannot; nothing once the reader is gone."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # such as a folder's name in a locale without its letters
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, unless the reader is gone."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def writelines(self, lines) -> None:
        """Write each of the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError) and error.errno not in GONE:
            self.failure = self.failure or error
            return
        self.closed_by_reader = True
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass  # a stream without a descriptor


def lasting(stream: TextIO) -> LastingStream:
    """The stream, made to outlive its reader."""
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)


def outlive_reader() -> None:
    """Let this process's standard output and error go on without a reader, also where they were closed before it."""
    sys.stdout = lasting(sys.stdout or _nowhere())
    sys.stderr = lasting(sys.stderr or _nowhere())


def _nowhere() -> TextIO:
    """What stands for a stream that the process was started without (`>&-`), which Python itself makes None."""
    return open(os.devnull, "w")


def is_unread() -> bool:
    """Whether nobody can read this process's standard output any more."""
    return getattr(sys.stdout, "closed_by_reader", False)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line that may hold text of others, such as names in shards."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def printable(text: str) -> str:
    """The text without control characters, which could move a terminal's cursor or change what it shows."""
    return "".join(character if character.isprintable() else "?" for character in text)
