"""The errors a user can cause and mend; the command line prints them as one line and exits with code 2."""

from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong. The message names the value, the place and the remedy."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of a `kind` of thing."""
    return UserError(f"unknown {kind} '{name}'; known: {', '.join(sorted(known))}")


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot make a graph, or has made too many of a function.

    No error of the model itself, such as of memory.
    """
    from torch._dynamo import exc  # imports the compiler, for which a run without it has no time

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def compiler_words(error: Exception) -> str:
    """What torch.compile raised, in a line."""
    reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:200]
    return f"{type(error).__name__}: {reason}"


class RunError(Exception):
    """A run cannot go on for a reason that lies in what it met, not in what the user gave."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status  # the process's exit status


class ProcessLostError(RunError):
    """A process of the run was lost (killed, or its node failed). What was done is kept: started again, it goes on."""

    def __init__(self, message: str):
        super().__init__(message, status=75)  # that of a job to be started again
