"""Every error that layerlake raises, on one page.

Each is also the built-in it resembles, so ``except LookupError`` and ``except RunNotFound`` both work.
A message says what happened, with the actual values; ``hint`` says the mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .verify import Verification

__all__ = [
    "DECODING_ERRORS",
    "AdapterMismatch",
    "AmbiguousRun",
    "AnalysisError",
    "CaptureInProgress",
    "CaptureUnfinished",
    "CorpusError",
    "CorruptRun",
    "DamagedLake",
    "FormatError",
    "LakeNotFound",
    "LayerLakeError",
    "MissingExtra",
    "ModelError",
    "NotInLake",
    "OverflowInCapture",
    "PlanError",
    "QueryError",
    "RunNotFound",
    "SelfCheckFailed",
    "SiteNotFound",
    "StoreError",
    "decoding",
    "did_you_mean",
]

DECODING_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What Python, Arrow, Blosc and the catalog raise when bytes are not what they should be."""


class LayerLakeError(Exception):
    """The root of all errors that layerlake raises on purpose."""

    hint: str
    """How to mend it; empty where the message already says so."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def advice(self) -> str:
        """The message, and behind it the hint."""
        return f"{self} {self.hint}".rstrip()


class NotInLake(LayerLakeError):
    """Something was asked for that the lake does not hold."""


class LakeNotFound(NotInLake, FileNotFoundError):
    """The path or URL is not a lake."""


class RunNotFound(NotInLake, LookupError):
    """No run has this id or prefix."""


class AmbiguousRun(LayerLakeError, LookupError):
    """Several runs fit, and the command needs one."""


class SiteNotFound(NotInLake, LookupError):
    """The site is unknown, or the run does not hold it."""


class FormatError(LayerLakeError, ValueError):
    """The lake was written in a format that this version does not read."""


class StoreError(LayerLakeError, OSError):
    """An object could not be read, written, listed or deleted: no connection, no access, no space."""


class CorruptRun(LayerLakeError, ValueError):
    """What lies in the lake contradicts its manifest."""


class DamagedLake(CorruptRun):
    """Objects of the lake are missing, or are not what was written; raised by ``verify`` alone."""

    verification: Verification
    """What was found."""


class PlanError(LayerLakeError, ValueError):
    """The capture that was asked for cannot be done as asked."""


class CorpusError(PlanError):
    """The text to capture cannot be read, or yields no documents."""


class ModelError(PlanError):
    """The model cannot be opened, or is not one that layerlake captures."""


class CaptureInProgress(LayerLakeError, RuntimeError):
    """Another capture of the same run is open."""


class CaptureUnfinished(LayerLakeError, RuntimeError):
    """A capture cannot be finalised: some partitions are not written yet."""


class SelfCheckFailed(LayerLakeError, AssertionError):
    """An identity that the captured values must satisfy does not hold for this model."""


class AdapterMismatch(SelfCheckFailed):
    """TransformerLens names a hook or a weight of this model otherwise than layerlake expects."""


class OverflowInCapture(LayerLakeError, OverflowError):
    """A captured value is not finite in the dtype in which it is stored."""


class AnalysisError(LayerLakeError, ValueError):
    """The analysis cannot be computed from what the run holds."""


class QueryError(LayerLakeError, ValueError):
    """The SQL is wrong, or is not a read."""


class MissingExtra(LayerLakeError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{package} is not installed; this command needs the extra '{extra}'.",
            hint=f'Install it with: pip install "layerlake[{extra}]"',
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by what it was made of: its message alone does not make one."""
        return type(self), (self.package, self.extra)


@contextmanager
def decoding(name: str, *, hint: str = "See what else is damaged: layerlake verify LAKE") -> Iterator[None]:
    """Raise CorruptRun, which names the object, for whatever damaged bytes make a reader raise inside the block.

    An object that is absent (FileNotFoundError) and errors that already say what happened pass through.
    """
    try:
        yield
    except (LayerLakeError, FileNotFoundError):
        raise
    except DECODING_ERRORS as error:
        raise CorruptRun(
            f"{name} is not what layerlake writes: {type(error).__name__}: {error}", hint=hint
        ) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known word nearest to ``word``, else an empty string.

    Examples
    --------
    >>> did_you_mean("mlp_poost", ["resid", "mlp_post"])
    " Did you mean 'mlp_post'?"
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
