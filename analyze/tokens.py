"""Which tokens of the evaluation mask an analysis looks at: all of them, or a seeded number spread evenly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..catalog.errors import AnalysisError, PlanError
from ..catalog.run import Run
from ..catalog.sizes import parse_count

__all__ = ["MaskedTokens", "canonical_tokens", "choose_spread", "choose_tokens"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """Tokens of the evaluation mask (:mod:`layerlake.catalog.mask`), in the order of the run's rows."""

    rows: Ints
    """``[token]``: places on the token axis of the sites."""
    documents: Ints
    """``[token]``: whose token it is."""
    next_ids: Ints
    """``[token]``: the token that really follows, which the model should predict."""
    are_all: bool
    """Whether they are the whole mask."""

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, items: Ints) -> Ints:
        """Return (document, row) of some of the tokens, which name a token within its run: ``[token, 2]``."""
        return np.stack([self.documents[items], self.rows[items]], axis=1)


def canonical_tokens(text: str) -> str:
    """Return one spelling of a number of tokens, so that ``20000`` and ``20k`` are one parameter.

    Raises
    ------
    AnalysisError
        It is neither a count nor ``all``.

    Examples
    --------
    >>> canonical_tokens("20000"), canonical_tokens("0.5k"), canonical_tokens("all")
    ('20k', '500', 'all')
    """
    if text == "all":
        return text
    try:
        count = parse_count(text)
    except PlanError as error:
        raise AnalysisError(
            f"'{text}' is not a number of tokens.", hint="Write it as 20000 or 20k (k = 1000), or 'all'."
        ) from error
    return str(count) if count % 1000 else f"{count // 1000}k"


def choose_spread(n: int, count: int, seed: int) -> Ints:
    """Return ``count`` of the numbers 0 … n-1, ascending: one at random from each of ``count`` equal stretches.

    So every document is drawn from in proportion to its length. All of them where ``count`` ≥ n.

    Examples
    --------
    >>> chosen = choose_spread(1000, 4, seed=0)
    >>> (chosen // 250).tolist()
    [0, 1, 2, 3]
    """
    if count >= n:
        return np.arange(n)
    edges = np.arange(count + 1) * n // count
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def choose_tokens(run: Run, tokens: str, seed: int) -> MaskedTokens:
    """Return the masked tokens that an analysis looks at. Reads the run's token table.

    Parameters
    ----------
    run : Run
        The run.
    tokens : str
        How many (``20k``), or ``all``.
    seed : int
        Of the choice.

    Raises
    ------
    AnalysisError
        The run has no token in the mask.
    """
    masked = run.masked_tokens
    if not masked.num_rows:
        raise AnalysisError(
            f"Run {run.run_id} has no token in the evaluation mask: no document is longer than 2 tokens.",
            hint="Capture longer documents.",
        )
    n = masked.num_rows
    chosen = choose_spread(n, n if tokens == "all" else parse_count(tokens), seed)
    rows, documents, next_ids = (
        masked[name].to_numpy().astype(np.int64)[chosen] for name in ("row", "document", "next_token_id")
    )
    return MaskedTokens(rows, documents, next_ids, are_all=len(chosen) == n)
