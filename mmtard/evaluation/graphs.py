"""Whether graphs computed what --compile asks of them, chunk by chunk: another process may have measured the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..attacks.fused import Fusion
from ..models.compiled import CompiledForward


class Graphs:
    """The graphs of this process, and whether they computed the chunk under way.

    forwards: of every tower, that of --transfer-from, too. fusion: of the attacks' arithmetic.
    """

    def __init__(self, forwards: Sequence[CompiledForward], fusion: Fusion):
        self.forwards, self.fusion = forwards, fusion
        self._earlier: set[bool | None] = set()

    def compiled(self) -> bool | None:
        """Of the chunk so far, as `all_compiled` says it."""
        fused = {False} if self.fusion.failed else set()
        return all_compiled(self._earlier.union(fused, *(forward.ran for forward in self.forwards)))

    def go_on(self, compiled: bool | None) -> None:
        """Count what an earlier process computed of the chunk under way."""
        self._earlier.add(compiled)

    def end_chunk(self) -> bool | None:
        """Of the whole chunk, as `all_compiled` says it; the next one begins."""
        compiled = self.compiled()
        for ran in (self._earlier, *(forward.ran for forward in self.forwards)):
            ran.clear()
        return compiled


def all_compiled(parts: Iterable[bool | None]) -> bool | None:
    """Whether graphs computed all parts: False where one ran without, None where none had anything that a graph is for.

    A graph is not for a single image, nor, on a CPU, for what asks a ViT for no gradient: these count for neither.
    """
    found = set(parts)
    return False if False in found else True if True in found else None
