"""Word in context: where in the model a linear probe can tell whether a word means the same in two sentences.

After arXiv 2406.19384, Figures 7a and 20, whose features, classifier and split are not published. A probe on the
concatenation [u; v] of the word's two states scores f(u) + g(v), and cannot say whether two senses are equal
whatever the states hold; so the probe of the default sees |u - v| and u ⊙ v, and the concatenation is a control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.run import Run
from .intervals import crossed_bootstrap, percentile_interval, ratio, standard_error, wilson_interval
from .statistic import State, Statistic, Unit, read_rows, tidy_table
from .wic_items import DEV_SPLITS, WicItems, choose_items, hold_out_words

__all__ = [
    "C_GRID",
    "FEATURES",
    "WIC_VERSION",
    "WIC_VIEWS",
    "WicOptions",
    "WicStatistic",
    "fit_probes",
    "pair_features",
]

WIC_VERSION = 2
WIC_VIEWS = ("wic", "wic_summary")

FEATURES = ("interaction", "concat", "concat_difference", "cosine")
"""What a probe sees of a pair of states; the first is the measurement, the others are its controls."""

C_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The inverse strengths of the L2 penalty that are tried."""

_MAX_ITERATIONS = 1000
_NOT_FITTED = -1
_UNDEFINED = "a state has no direction to take a cosine of: in every dimension it is the mean of train"
_ONE_SEED = "no spread: only one seed"

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class WicOptions:
    """Which state stands for the word, which items a probe learns from, and how often."""

    pooling: Literal["last", "mean"] = field(
        default="last",
        metadata={"help": "The state of a word of several tokens: that of the last of them, or their mean."},
    )
    seeds: int = field(default=5, metadata={"help": "How many times to draw the words on which C is chosen."})
    train_split: str = field(default="train", metadata={"help": "The split to fit on."})
    dev_split: str = field(
        default="auto",
        metadata={"help": f"The split to report on; auto is the first of {', '.join(DEV_SPLITS)} there is."},
    )

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise AnalysisError(f"At least one seed is needed, not {self.seeds}.")


@dataclass(frozen=True, slots=True)
class WicBlock:
    """What a unit reads: the word's states at one boundary."""

    boundary: int
    states: Floats
    """``[item, sentence, d_model]``"""


@dataclass(frozen=True, slots=True)
class WicStatistic(Statistic[WicBlock]):
    """The probes of every boundary.

    A unit reads the rows of the words at one boundary, and fits 4 × seeds × 6 probes and at most 24 more. It
    holds 50 bytes for each item and dimension (WiC's 6,066 items at d_model 4096: 1.2 GB). The state is
    4 bytes for each boundary, features, seed and item of dev.
    """

    run: str
    options: WicOptions
    items: WicItems
    held_out: Bools
    """``[seed, item of train]``: on which C is chosen."""
    n_boundaries: int

    @classmethod
    def open(cls, run: Run, options: WicOptions) -> Self:
        """Find the items in the documents table, and draw the words on which C is chosen.

        Raises
        ------
        AnalysisError
            The run holds no wic documents, lacks a split, or has too few items of a label to learn from.
        """
        items = choose_items(run, options.train_split, options.dev_split, pooling=options.pooling)
        held_out = hold_out_words(run, items, options.seeds)
        return cls(run.run_id, options, items, held_out, run.shape.n_layers + 1)

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        items = np.arange(len(self.items.labels))
        return [Unit((("resid", boundary),), items) for boundary in range(self.n_boundaries)]

    def read(self, run: Run, unit: Unit) -> WicBlock:
        """Read the rows of the words, and take the mean over each word's."""
        ((site, boundary),) = unit.reads
        starts, ends = self.items.spans[unit.items].reshape(-1, 2).T
        lengths = ends - starts
        first = np.cumsum(lengths) - lengths  # where each word begins among the rows of all
        rows, places = np.unique(
            np.arange(lengths.sum()) + np.repeat(starts - first, lengths), return_inverse=True
        )
        values = read_rows(run, site, boundary, rows)[places]
        sums = np.add.reduceat(values, first, axis=0, dtype=np.float32)
        states: Floats = np.divide(sums, lengths[:, None], dtype=np.float32)
        return WicBlock(boundary, states.reshape(len(unit.items), 2, -1))

    def zero(self) -> State:  # noqa: D102
        return State.empty(3, (2 + len(self.items.labels) - self.items.n_train,), np.float32)

    def measure(self, block: WicBlock) -> State:
        """Return the state of a boundary.

        Key (boundary, number of the features, seed), values: which of ``C_GRID`` was chosen (-1: no probe could
        be fitted), whether the probe converged, and for each item of dev whether it was right.
        """
        u, v = _standardised(block.states, self.items.n_train)
        keys, values = [], []
        for number, name in enumerate(FEATURES):
            x = pair_features(name, u, v)
            for seed, found in enumerate(fit_probes(x, self.items.labels, self.held_out)):
                keys.append((block.boundary, number, seed))
                values.append(found)
        return State.of(np.array(keys), np.array(values))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``wic``, a row for each boundary, features and seed, and ``wic_summary``, over the seeds.

        ``layer`` is the block after which the state is taken, -1 the embedding; ``boundary`` is layer + 1.
        """
        n_seeds = len(self.held_out)
        fitted = state.values[:, 0] != _NOT_FITTED
        stopped = fitted & (state.values[:, 1] == 0)
        correct = state.values[:, 2:].astype(np.float64)
        correct[~fitted] = np.nan
        grid = np.append(C_GRID, np.nan)
        lo, hi = wilson_interval(correct.mean(axis=1), correct.shape[1])
        single = {
            **self._places(state.keys),
            "seed": state.keys[:, 2].astype(np.int32),
            "accuracy": correct.mean(axis=1),
            "accuracy_lo": lo,
            "accuracy_hi": hi,
            "stderr_dev": _binomial_error(correct.mean(axis=1), correct.shape[1]),
            "C": grid[state.values[:, 0].astype(np.int64)],
            **_remarks([None if here else _UNDEFINED for here in fitted], stopped),
        }
        by_probe = correct.reshape(-1, n_seeds, correct.shape[1])
        by_seed = by_probe.mean(axis=2)
        lo, hi = percentile_interval(crossed_bootstrap(by_probe), n_documents=correct.shape[1])
        summary = {
            **self._places(state.keys[::n_seeds]),
            "accuracy": by_seed.mean(axis=1),
            "accuracy_lo": lo,
            "accuracy_hi": hi,
            "stderr_dev": _binomial_error(by_seed.mean(axis=1), correct.shape[1]),
            "stderr_seeds": standard_error(by_seed),
            **_remarks(
                [(None if n_seeds > 1 else _ONE_SEED) if here else _UNDEFINED for here in fitted[::n_seeds]],
                stopped.reshape(-1, n_seeds).any(axis=1),
            ),
        }
        params = {**self.key, "dev_split": self.items.dev_split, "variant": "default"}
        return {
            "wic": tidy_table(self.run, single, params),
            "wic_summary": tidy_table(self.run, summary, params),
        }

    def _places(self, keys: Ints) -> dict[str, Any]:
        """Return the columns that say which probe a row is about, and of how many items."""
        n, n_train = len(keys), self.items.n_train
        return {
            "layer": (keys[:, 0] - 1).astype(np.int32),
            "boundary": keys[:, 0].astype(np.int32),
            "features": [FEATURES[number] for number in keys[:, 1]],
            "n_train": np.full(n, n_train, dtype=np.int64),
            "n_dev": np.full(n, len(self.items.labels) - n_train, dtype=np.int64),
            "n_left_out": np.full(n, self.items.n_left_out, dtype=np.int64),
        }


def _standardised(states: Floats, n_train: int) -> tuple[Floats, Floats]:
    """Return the two states of each item with mean 0 and variance 1 over the states of train."""
    from sklearn.preprocessing import StandardScaler

    width = states.shape[-1]
    scaler = StandardScaler().fit(states[:n_train].reshape(-1, width))
    scaled = scaler.transform(states.reshape(-1, width)).reshape(states.shape)
    return scaled[:, 0], scaled[:, 1]


def pair_features(name: str, u: Floats, v: Floats) -> Floats:
    """Return what a probe sees of pairs of states: ``[item, feature]``.

    Parameters
    ----------
    name : {'interaction', 'concat', 'concat_difference', 'cosine'}
        [|u - v|; u ⊙ v]; [u; v]; [u; v; |u - v|]; the cosine of u and v, on which a probe is a threshold.
    u, v : float32 ``[item, d_model]``
        The states of the word in the first and in the second sentence.
    """
    match name:
        case "interaction":
            return np.hstack([np.abs(u - v), u * v])
        case "concat":
            return np.hstack([u, v])
        case "concat_difference":
            return np.hstack([u, v, np.abs(u - v)])
        case _:
            norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
            return ratio(np.vecdot(u, v), norms).astype(np.float32)[:, None]


def fit_probes(x: Floats, labels: Bools, held_out: Bools) -> Iterator[Floats]:
    """Fit a logistic regression with an L2 penalty to train, for each seed, and yield what it says of dev.

    C is the one of ``C_GRID`` with the highest accuracy on the items that the seed holds out of the fit (the
    smallest, where several are best); then the probe is fitted to all of train. Seeds that choose the same C
    have the same probe.

    Parameters
    ----------
    x : float32 ``[item, feature]``
        Train first, then dev.
    labels : bool ``[item]``
        What is to be said.
    held_out : bool ``[seed, item of train]``
        The items on which C is chosen.

    Yields
    ------
    float32 ``[2 + item of dev]``
        The number of C in ``C_GRID`` or -1, whether the fit converged, and whether each item was right.
    """
    from sklearn.linear_model import LogisticRegression

    n_train = held_out.shape[1]
    train, dev = x[:n_train], x[n_train:]
    if not np.isfinite(x).all():  # a cosine with a vector of zeros
        nothing = np.zeros(2 + len(dev), dtype=np.float32)
        nothing[0] = _NOT_FITTED
        yield from [nothing] * len(held_out)
        return
    finished: dict[int, Floats] = {}
    for held in held_out:
        # each C begins where the one before it ended
        path = LogisticRegression(warm_start=True, max_iter=_MAX_ITERATIONS)
        inside, outside, target = train[~held], train[held], labels[:n_train][~held]
        scores = [
            path.set_params(C=C).fit(inside, target).score(outside, labels[:n_train][held]) for C in C_GRID
        ]
        best = int(np.argmax(scores))
        if best not in finished:
            probe = LogisticRegression(C=C_GRID[best], max_iter=_MAX_ITERATIONS).fit(train, labels[:n_train])
            right = probe.predict(dev) == labels[n_train:]
            converged = probe.n_iter_[0] < _MAX_ITERATIONS
            finished[best] = np.array([best, converged, *right], dtype=np.float32)
        yield finished[best]


def _remarks(reasons: list[str | None], stopped: Bools) -> dict[str, Any]:
    """Return the columns that say why there is no value, and what to know of one."""
    unfinished = f"a fit did not converge in {_MAX_ITERATIONS} iterations"
    return {"reason": reasons, "note": [unfinished if here else None for here in stopped]}


def _binomial_error(share: Doubles, n: int) -> Doubles:
    return np.asarray(np.sqrt(share * (1 - share) / n))
