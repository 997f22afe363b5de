"""Prediction and suppression neurons, from the weights alone (arXiv 2406.19384, §4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.findings import list_findings, read_finding
from ..catalog.run import Run
from .statistic import State, Statistic, Unit, tidy_table

__all__ = [
    "CLASSES",
    "MOMENTS",
    "NEURONS_VERSION",
    "NEURONS_VIEWS",
    "THRESHOLDS",
    "NeuronOptions",
    "NeuronStatistic",
    "classify_neurons",
    "fold_unembedding",
    "known_moments",
    "moments_of_sums",
    "power_sums",
    "preprocessing",
    "unit_unembedding",
]

NEURONS_VERSION = 2
NEURONS_VIEWS = ("neurons", "neuron_counts")

CLASSES = ("prediction", "suppression", "other")

THRESHOLDS = (8.0, 10.0, 12.0)
"""Kurtoses above which neurons are counted in any case: how much hangs on the choice of one."""

MOMENTS = ("mean", "variance", "skew", "kurtosis")

_UNIT_NEURONS = 768  # a tall product runs faster
_COLUMNS = 512  # of the vocabulary at a time: they and their squares stay in a core's cache

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NeuronOptions:
    """What a neuron's output is compared with, and when it counts."""

    columns: Literal["real", "all"] = field(
        default="real",
        metadata={
            "help": "The columns of the unembedding: those of real tokens, or also its padding, as the authors do."
        },
    )
    threshold: float = field(
        default=10.0, metadata={"help": "Kurtosis (Gaussian = 3) above which a neuron is counted."}
    )


def preprocessing(*, layernorm: bool) -> dict[str, bool]:
    """Return what is done to the weights first, as columns of every table that stands on them.

    ``folded``: the final norm's scale is folded into the unembedding; ``vocab_centred``: its mean over the vocabulary
    is subtracted; ``centred``: so is every vector's mean over d_model, in the unembedding and in W_out.
    """
    return {"folded": True, "vocab_centred": True, "centred": layernorm}


def fold_unembedding(unembed: Floats, gamma: Floats, *, layernorm: bool) -> Floats:
    """Return W_U with the final norm folded in, centred.

    γ is folded in; for LayerNorm each column is centred over d_model, as a reader is; each row is centred
    over the vocabulary, padding included. Means are summed in float64; allocates one array of W_U's size.

    Parameters
    ----------
    unembed : float32 ``[d_model, vocab]``
        W_U, raw.
    gamma : float32 ``[d_model]``
        The final norm's weight.
    layernorm : bool
        Whether the final norm subtracts the mean.
    """
    folded = gamma[:, None] * unembed
    if layernorm:
        folded -= folded.mean(axis=0, dtype=np.float64)
    folded -= folded.mean(axis=1, dtype=np.float64, keepdims=True)
    return folded


def unit_unembedding(unembed: Floats, gamma: Floats, *, layernorm: bool) -> Floats:
    """Return what :func:`fold_unembedding` does, its columns scaled to length 1; one of zeros stays one.

    Lengths are summed in float64.
    """
    folded = fold_unembedding(unembed, gamma, layernorm=layernorm)
    lengths = np.sqrt(np.einsum("dv,dv->v", folded, folded, dtype=np.float64))
    folded /= np.where(lengths > 0, lengths, 1.0)
    return folded


def power_sums(values: npt.NDArray[np.floating]) -> Doubles:
    """Return Σx, Σx², Σx³, Σx⁴ of each row: float64 ``[row, power]``, summed in the dtype of the values.

    So give a few hundred of float32 at a time, and add up the results.
    """
    squares = values * values
    powers = (np.ones_like(values[0]), values), (values, values), (squares, values), (squares, squares)
    return np.stack([np.vecdot(a, b) for a, b in powers], axis=1).astype(np.float64)


def moments_of_sums(sums: Doubles, n: int, shift: npt.ArrayLike = 0.0) -> Doubles:
    """Return mean, variance, skew and kurtosis (population; Gaussian = 3): float64 ``[row, moment]``.

    Skew and kurtosis of a row without variance are NaN.

    Parameters
    ----------
    sums : float64 ``[row, power]``
        Of :func:`power_sums`, of values from which ``shift`` had been subtracted. The nearer the shift is to
        the mean, the fewer digits are lost.
    n : int
        How many values were added.
    shift : float64 ``[row]``
        What was subtracted.

    Examples
    --------
    >>> moments_of_sums(power_sums(np.array([[0, 1, 2, 3, 10.0]])), 5).round(5).tolist()
    [[3.2, 12.56, 1.2099, 2.876]]
    """
    m1, m2, m3, m4 = (sums / n).T
    variance = np.maximum(m2 - m1**2, 0.0)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    spread = np.where(variance > 0, variance, np.nan)
    return np.stack([m1 + shift, variance, third / spread**1.5, fourth / spread**2], axis=1)


def classify_neurons(skew: Doubles, kurtosis: Doubles, threshold: float) -> Ints:
    """Return the number of each neuron's class in :data:`CLASSES`.

    Prediction: kurtosis above the threshold and positive skew; suppression: negative skew.

    Examples
    --------
    >>> classes = classify_neurons(np.array([1.0, -1.0, 1.0]), np.array([11.0, 11.0, 3.0]), 10.0)
    >>> [CLASSES[i] for i in classes]
    ['prediction', 'suppression', 'other']
    """
    heavy = kurtosis > threshold
    return np.select([heavy & (skew > 0), heavy & (skew < 0)], [0, 1], default=2)


@dataclass(frozen=True, slots=True)
class NeuronStatistic(Statistic[tuple[int, Ints, Floats]]):
    """Moments of the cosines between a neuron's output and every unembedding column.

    A unit reads 768 neurons of W_out and multiplies them with blocks of the unembedding; all workers of a
    process share the latter, d_model·vocab·4 bytes. The state is 48 bytes a neuron. Costs
    2·d_model·vocab operations a neuron.
    """

    run: str
    options: NeuronOptions
    unembed: Floats
    """``[d_model, column]``: processed, unit length, their mean subtracted, so that the cosines have mean 0."""
    mean_column: Floats
    """``[d_model]``: what was subtracted."""
    layernorm: bool
    n_layers: int
    d_mlp: int

    @classmethod
    def open(cls, run: Run, options: NeuronOptions) -> Self:
        """Read and process the unembedding: while it does, three times d_model·vocab·4 bytes."""
        layernorm = run.shape.norm == "layernorm"
        unembed = unit_unembedding(run.weight("W_U"), run.weight("ln_final.w"), layernorm=layernorm)
        if options.columns == "real":
            unembed = unembed[:, run.vocab["token_id"].to_numpy()]
        unembed = unembed[:, unembed.any(axis=0)]  # a cosine with nothing is nothing
        mean = unembed.mean(axis=1, dtype=np.float64).astype(np.float32)
        unembed -= mean[:, None]
        return cls(run.run_id, options, unembed, mean, layernorm, run.shape.n_layers, run.shape.d_mlp)

    @property
    def key(self) -> Mapping[str, Any]:  # noqa: D102
        return asdict(self.options)

    def units(self) -> list[Unit]:  # noqa: D102
        return [
            Unit((("W_out", layer),), np.arange(start, min(start + _UNIT_NEURONS, self.d_mlp)))
            for layer in range(self.n_layers)
            for start in range(0, self.d_mlp, _UNIT_NEURONS)
        ]

    def read(self, run: Run, unit: Unit) -> tuple[int, Ints, Floats]:
        """Read the layer, the numbers of the neurons, and their rows of W_out: ``[unit, d_model]``."""
        ((weight, layer),) = unit.reads
        rows = run.weight_array(weight)[layer, int(unit.items[0]) : int(unit.items[-1]) + 1]
        return layer, unit.items, np.asarray(rows, dtype=np.float32)

    def zero(self) -> State:  # noqa: D102
        return State.empty(2, (4,))

    def measure(self, block: tuple[int, Ints, Floats]) -> State:
        """Return the state of a block: key (layer, unit), values mean, variance, skew, kurtosis.

        All NaN for a neuron that writes nothing.
        """
        layer, units, w_out = block
        wide = w_out.astype(np.float64)
        if self.layernorm:
            wide -= wide.mean(axis=1, keepdims=True)  # a writer's mean over d_model is never read
        lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        directions = np.divide(wide, lengths, out=np.full_like(wide, np.nan), where=lengths > 0).astype(
            np.float32
        )
        n_columns = self.unembed.shape[1]
        sums = np.zeros((len(units), 4))
        product = np.empty(len(units) * _COLUMNS, dtype=np.float32)
        for start in range(0, n_columns, _COLUMNS):
            columns = self.unembed[:, start : start + _COLUMNS]
            cosines = product[: len(units) * columns.shape[1]].reshape(len(units), -1)
            sums += power_sums(np.matmul(directions, columns, out=cosines))
        moments = moments_of_sums(sums, n_columns, shift=directions.astype(np.float64) @ self.mean_column)
        return State.of(np.stack([np.full_like(units, layer), units], axis=1), moments)

    def finalise(self, state: State) -> dict[str, pa.Table]:
        """Return ``neurons`` and, for each layer and class, ``neuron_counts``.

        The moments are those of the cosines over the unembedding's columns. ``density`` is the share of the
        layer's d_mlp neurons, ``density_percent`` the same in percent, as in the paper. Counts are those above
        ``min_kurtosis``: the option ``threshold``, which decides ``class``, and :data:`THRESHOLDS`.
        """
        variant = "authors" if self.options.columns == "all" else "default"
        params = {**self.key, **preprocessing(layernorm=self.layernorm), "variant": variant}
        layer, unit = state.keys.T
        _, variance, skew, kurtosis = state.values.T
        neurons = {
            "layer": layer.astype(np.int32),
            "unit": unit.astype(np.int32),
            **dict(zip(MOMENTS, state.values.T, strict=True)),
            "class": np.array(CLASSES, dtype=object)[
                classify_neurons(skew, kurtosis, self.options.threshold)
            ],
            "n_columns": np.full(len(layer), self.unembed.shape[1], dtype=np.int32),
            "reason": [_reason(*each) for each in zip(variance, kurtosis, strict=True)],
        }
        n_classes = len(CLASSES)
        thresholds = np.array(sorted({*THRESHOLDS, self.options.threshold}))
        groups = [layer * n_classes + classify_neurons(skew, kurtosis, least) for least in thresholds]
        counts = np.concatenate([np.bincount(each, minlength=self.n_layers * n_classes) for each in groups])
        table = {
            "layer": np.tile(np.repeat(np.arange(self.n_layers, dtype=np.int32), n_classes), len(thresholds)),
            "class": list(CLASSES) * (self.n_layers * len(thresholds)),
            "min_kurtosis": np.repeat(thresholds, self.n_layers * n_classes),
            "n_units": counts.astype(np.int64),
            "density": counts / self.d_mlp,
            "density_percent": 100 * counts / self.d_mlp,
        }
        return {
            "neurons": tidy_table(self.run, neurons, params),
            "neuron_counts": tidy_table(self.run, table, params),
        }


def _reason(variance: float, kurtosis: float) -> str | None:
    """Return why moments of a neuron are NULL."""
    if np.isnan(variance):
        return "no moments: the neuron writes nothing"
    return "no skew and kurtosis: all cosines are equal" if np.isnan(kurtosis) else None


def known_moments(run: Run, options: NeuronOptions) -> State | None:
    """Return the state of :class:`NeuronStatistic` from a finding of the same run, or None if the lake has none.

    The threshold does not matter: the moments are the same for all.
    """
    view = NEURONS_VIEWS[0]
    for stored in list_findings(run.store, view):
        key = stored.key
        if (key.version, key.run, key.params.get("columns")) == (
            NEURONS_VERSION,
            run.run_id,
            options.columns,
        ):
            finding = read_finding(run.store, key, [view])
            if finding is not None:  # it was not removed meanwhile
                columns = (finding.table[name].to_numpy() for name in ("layer", "unit", *MOMENTS))
                layer, unit, *moments = columns  # NULL comes back as NaN
                return State.of(np.stack([layer, unit], axis=1), np.stack(moments, axis=1))
    return None
