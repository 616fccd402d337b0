"""Local and remote shards as streams of bytes, through webdataset's openers."""

import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import UserError
from .paths import is_remote


@contextmanager
def open_shard(shard: str) -> Iterator[BinaryIO]:
    """The bytes of a local or remote shard as a stream.

    A `pipe:` shard runs its command; whether it may is decided where shards are named (`paths.check_openers`).
    Raises OSError when the shard cannot be opened or its opener's program fails.
    """
    if not is_remote(shard):
        with open(shard, "rb") as file:
            yield file
        return
    # Some versions of webdataset hand an address to a shell, in single quotes.
    strange = [c for c in shard if not c.isprintable() or (c in "'\"`\\ " and not shard.startswith(("pipe:", "file:")))]
    if strange:
        raise OSError(f"its address holds {strange[0]!r}, which no address has; write it as %{ord(strange[0]):02X}")
    try:
        from webdataset.gopen import gopen

        stream = gopen(shard, "rb")
    except ModuleNotFoundError as error:
        raise UserError(f"shard '{shard}': reading it needs {error.name}; pip install {error.name}") from None
    except ValueError:  # a scheme that webdataset has no opener for
        raise OSError(
            "no opener for this scheme; write it as a command, like pipe:aws s3 cp s3://bucket/0.tar -"
        ) from None
    try:
        yield stream
    except OSError:
        if getattr(stream, "status", None):
            raise OSError(f"its opener ended with status {stream.status}") from None
        raise
    except (tarfile.ReadError, UserError):
        # A program we stopped reading from dies of the closed pipe; any other failure of it explains what we could not
        # read.
        _close(stream, tolerated=(-signal.SIGPIPE,))
        raise
    else:
        _close(stream)


def _close(stream: BinaryIO, tolerated: tuple[int, ...] = ()) -> None:
    try:
        stream.close()
    except OSError as error:
        if (status := getattr(stream, "status", None)) not in tolerated:
            raise OSError(f"its opener ended with status {status}" if status else str(error)) from None
