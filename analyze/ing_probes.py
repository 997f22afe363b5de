"""Probes for "-ing": whether some neurons, and the model itself, foretell a token that ends in "-ing".

Each fold of the examples is the test set once, the next one the validation set and the other three the
training set: 60/20/20, no document on two sides, and every example tested once. Ensembles add neurons in
the order of their own validation accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.readout import Readout
from ..catalog.run import Run
from .ing_examples import N_FOLDS, Examples, IngTokens
from .intervals import bootstrap_sums, percentile_interval
from .readout import MEASURES, compare_distributions
from .statistic import State, Statistic, Unit, read_rows, tidy_table

__all__ = ["IngActivationStatistic", "IngProbeStatistic", "ProbeNeurons", "best_threshold", "fit_probe"]

_UNIT_EXAMPLES = 256
_MAX_ITERATIONS = 2000

_BASELINES = ("top1_is_ing", "p_ing", "p_ing_tuned", "top1_exact")
_ROW = (
    ("probe", pa.string()),
    ("features", pa.string()),
    ("k", pa.int32()),
    ("layer", pa.int32()),
    ("unit", pa.int32()),
    ("effect", pa.string()),
)

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ProbeNeurons:
    """The neurons whose activations are read, ordered by layer and unit, and who they are."""

    layers: Ints
    units: Ints
    selected: Ints
    """Places of the selected ones in this order, the one that ranks first in front."""
    random: Ints
    """Of as many random ones, each from the layer of the selected one."""
    heavy: Ints
    """Of all with heavy tails in these layers."""

    @classmethod
    def of(cls, selected: Ints, heavy: Ints, d_mlp: int, seed: int) -> Self:
        """Draw the random ones, and put all in order.

        Parameters
        ----------
        selected : int64 ``[neuron, 2]``
            Layer and unit of each, the first one in front.
        heavy : int64 ``[neuron, 2]``
            Those with heavy tails, of any layer.
        d_mlp : int
            Neurons of a layer.
        seed : int
            Of the draw.
        """
        rng = np.random.default_rng(seed)
        random = np.empty_like(selected)
        for layer in np.unique(selected[:, 0]):
            ours = selected[:, 0] == layer
            others = rng.permutation(np.setdiff1d(np.arange(d_mlp), selected[ours, 1]))
            drawn = np.resize(others, ours.sum()) if len(others) else selected[ours, 1]
            random[ours] = np.stack([np.full(ours.sum(), layer), drawn], axis=1)
        heavy = heavy[np.isin(heavy[:, 0], selected[:, 0])]
        every, inverse = np.unique(np.concatenate([selected, random, heavy]), axis=0, return_inverse=True)
        n = len(selected)
        places = inverse.ravel()
        return cls(every[:, 0], every[:, 1], places[:n], places[n : 2 * n], places[2 * n :])


@dataclass(frozen=True, slots=True)
class IngBlock:
    """What one unit reads."""

    items: Ints
    neurons: Floats
    """``[example, neuron]``: activations where the model foretells."""
    last: npt.NDArray[Any]
    """``[example, d_model]``: the final residual there."""


@dataclass(frozen=True, slots=True)
class IngActivationStatistic(Statistic[IngBlock]):
    """What the model and the chosen neurons say before each example: what the probes are fitted to.

    A unit reads 256 examples, of ``mlp_post`` one layer at a time: 256·d_mlp values, and the chunks that
    hold them. All workers of a process share the readout, (d_model + 1)·vocab·4 bytes. The state is
    4 bytes an example and neuron.
    """

    examples: Examples
    neurons: ProbeNeurons
    tokens: IngTokens
    readout: Readout
    n_layers: int
    params: Mapping[str, Any]

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return self.params

    def units(self) -> list[Unit]:  # noqa: D102
        layers = np.unique(self.neurons.layers)
        reads = (*(("mlp_post", int(layer)) for layer in layers), ("resid", self.n_layers))
        items = np.arange(len(self.examples))
        return [Unit(reads, items[i : i + _UNIT_EXAMPLES]) for i in range(0, len(items), _UNIT_EXAMPLES)]

    def read(self, run: Run, unit: Unit) -> IngBlock:  # noqa: D102
        rows = self.examples.rows[unit.items]
        *neurons, last = unit.reads
        columns = [
            read_rows(run, site, layer, rows)[:, self.neurons.units[self.neurons.layers == layer]]
            for site, layer in neurons
        ]
        activations = np.concatenate(columns, axis=1, dtype=np.float32)
        return IngBlock(unit.items, activations, read_rows(run, *last, rows))

    def zero(self) -> State:  # noqa: D102
        return State.empty(1, (2 + len(self.neurons.units),), np.float32)

    def measure(self, block: IngBlock) -> State:
        """Return the state of a block: key (example), values top-1 token, P("-ing"), each neuron.

        -ln P(k) less -ln P(k | "-ing") is -ln P("-ing"), whichever "-ing" token k is.
        """
        normed = self.readout.normed(block.last)
        columns = np.flatnonzero(self.tokens.is_ing)
        first = np.zeros(len(block.items), dtype=np.int64)
        over_all = compare_distributions(self.readout.unembed, normed, [], first + columns[0])[:, 0]
        over_ing = compare_distributions(self.readout.unembed[:, columns], normed, [], first)[:, 0]
        loss = MEASURES.index("loss_nats")
        model = [over_all[:, MEASURES.index("top1_token")], np.exp(over_ing[:, loss] - over_all[:, loss])]
        values = np.concatenate([np.stack(model, axis=1), block.neurons], axis=1, dtype=np.float32)
        return State.of(block.items[:, None], values)

    def finalise(self, state: State) -> dict[str, pa.Table]:  # noqa: ARG002
        """Return no table: :class:`IngProbeStatistic` takes the state itself."""
        return {}


@dataclass(frozen=True, slots=True)
class IngProbeStatistic(Statistic[int]):
    """Whether each probe converged, and is right about each example, when it is tested and when it is validated.

    A unit fits some 130 logistic regressions for one fold and reads nothing; all workers of a process share
    the activations. Each holds them once more in float64 while it fits. The state is a byte an example,
    probe and part.
    """

    run: str
    examples: Examples
    neurons: ProbeNeurons
    tokens: IngTokens
    effects: tuple[str, ...]
    """Of each selected neuron."""
    values: Floats
    """Of :class:`IngActivationStatistic`, all examples."""
    params: Mapping[str, Any]

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return self.params

    def units(self) -> list[Unit]:  # noqa: D102
        return [Unit((), np.array([fold])) for fold in range(N_FOLDS)]

    def read(self, run: Run, unit: Unit) -> int:  # noqa: ARG002
        """Return the number of the fold that is tested."""
        return int(unit.items[0])

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (len(self._rows()),), np.bool_)

    def measure(self, block: int) -> State:
        """Return the state of a fold.

        Key (0 tested, 1 validated; example), values whether a probe is right; key (2; fold), whether it converged.
        """
        test, validation = (self.examples.folds == (block + i) % N_FOLDS for i in range(2))
        right, converged = self._answers(~(test | validation), validation)
        parts = [np.flatnonzero(test), np.flatnonzero(validation), np.array([block])]
        keys = np.concatenate(
            [np.stack([np.full_like(part, i), part], axis=1) for i, part in enumerate(parts)]
        )
        return State.of(keys, np.concatenate([right[test], right[validation], converged[None]]))

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``ing``: a row for each single neuron, each ensemble, and each way to ask the model."""
        n_examples, rows = len(self.examples), self._rows()
        tested, validated, converged = (state.values[state.keys[:, 0] == part] for part in range(3))
        unfinished = f"a fit did not converge in {_MAX_ITERATIONS} iterations"
        # items of a document are not independent, so whole documents are drawn again; they lie together
        starts = np.flatnonzero(np.diff(self.examples.documents, prepend=-1))
        with_counts = np.column_stack([tested, np.ones(n_examples)])
        by_document = np.add.reduceat(with_counts, starts, axis=0, dtype=np.float64)
        resampled = bootstrap_sums(by_document)
        lo, hi = percentile_interval(resampled[:, :-1] / resampled[:, -1:], n_documents=len(starts))
        columns = {name: pa.array([row[i] for row in rows], kind) for i, (name, kind) in enumerate(_ROW)} | {
            "accuracy": tested.mean(axis=0),
            "accuracy_lo": lo,
            "accuracy_hi": hi,
            "validation_accuracy": validated.mean(axis=0),
            "n_examples": np.full(len(rows), n_examples, dtype=np.int64),
            "n_documents": np.full(len(rows), len(starts), dtype=np.int64),
            "note": [None if all_of_them else unfinished for all_of_them in converged.all(axis=0)],
        }
        return {"ing": tidy_table(self.run, columns, self.params)}

    def _rows(self) -> list[tuple[str, str, int | None, int | None, int | None, str | None]]:
        """Return what each probe is, in the columns of ``_ROW``."""
        neurons = self.neurons
        n = len(neurons.selected)
        groups = {"selected": neurons.selected, "random": neurons.random}
        effects = {"selected": self.effects, "random": [None] * n}
        return [
            *(
                ("neuron", name, 1, int(neurons.layers[i]), int(neurons.units[i]), effect)
                for name, group in groups.items()
                for i, effect in zip(group, effects[name], strict=True)
            ),
            *(("ensemble", name, k, None, None, None) for name in groups for k in range(1, n + 1)),
            *[("ensemble", "heavy_tailed", len(neurons.heavy), None, None, None)][: len(neurons.heavy)],
            *(("model", name, None, None, None, None) for name in _BASELINES),
        ]

    def _answers(self, train: Bools, validation: Bools) -> tuple[Bools, Bools]:
        """Return whether each probe, fitted to ``train``, is right ``[example, probe]``, and converged ``[probe]``."""
        labels = self.examples.labels
        top1, p_ing, activations = self.values[:, 0].astype(np.int64), self.values[:, 1], self.values[:, 2:]

        def probe(neurons: Ints) -> tuple[Bools, bool]:
            says, converged = fit_probe(activations[:, neurons], labels, train)
            return says == labels, converged

        singles, ensembles = [], []
        for group in (self.neurons.selected, self.neurons.random):
            alone = [probe(group[i : i + 1]) for i in range(len(group))]
            best = np.argsort([-hits[validation].mean() for hits, _ in alone], kind="stable")
            ensembles += [alone[best[0]], *(probe(group[best[:k]]) for k in range(2, len(group) + 1))]
            singles += alone
        heavy = [probe(self.neurons.heavy)] if len(self.neurons.heavy) else []
        threshold = best_threshold(p_ing[validation], labels[validation])
        baselines = (
            self.tokens.is_ing[top1] == labels,
            (p_ing > 0.5) == labels,
            (p_ing > threshold) == labels,
            top1 == self.examples.targets,
        )
        answers = [*singles, *ensembles, *heavy, *((hits, True) for hits in baselines)]
        return np.stack([hits for hits, _ in answers], axis=1), np.array(
            [finished for _, finished in answers]
        )


def fit_probe(features: Floats, labels: Bools, train: Bools) -> tuple[Bools, bool]:
    """Fit a logistic regression to some examples; return what it says of all ``[example]``, and whether it converged.

    Ridge penalty (C = 1) on features that are standardised by the examples fitted to.

    Parameters
    ----------
    features : float32 ``[example, feature]``
    labels : bool ``[example]``
    train : bool ``[example]``
        Which examples it is fitted to.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    wide = features.astype(np.float64)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    says: Bools = probe.fit(wide[train], labels[train]).predict(wide)
    return says, bool(probe[-1].n_iter_[0] < _MAX_ITERATIONS)


def best_threshold(scores: npt.NDArray[np.floating], labels: Bools) -> float:
    """Return the threshold above which calling examples true is right most often; the lowest of equals.

    Examples
    --------
    >>> best_threshold(np.array([0.125, 0.5, 0.25, 0.75]), np.array([False, True, False, True]))
    0.375
    """
    order = np.argsort(scores, kind="stable")
    ordered, truth = scores[order].astype(np.float64), labels[order]
    right = np.concatenate([[0], np.cumsum(~truth)]) + truth.sum() - np.concatenate([[0], np.cumsum(truth)])
    between = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])
    edges = np.concatenate([[-np.inf], ordered, [np.inf]])
    cut = int(np.where(between, right, -1).argmax())
    return float((edges[cut] + edges[cut + 1]) / 2)
