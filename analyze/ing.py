"""Neurons that speak for or against "-ing", and probes of what they know (arXiv 2406.19384, §4.3).

After Figures 9, 10, 12 and 23, and Figures 10 and 16 of the first version. A neuron is a candidate if the
cosines between its output vector and the token directions have heavy tails or a high variance; candidates
are ranked by how far apart their outputs put the tokens that end in "-ing" and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError
from ..catalog.readout import Readout
from ..catalog.run import Run
from .ing_examples import MIN_EXAMPLES, IngTokens, find_examples
from .ing_probes import IngActivationStatistic, IngProbeStatistic, ProbeNeurons
from .neurons import (
    CLASSES,
    MOMENTS,
    NeuronOptions,
    NeuronStatistic,
    classify_neurons,
    fold_unembedding,
    known_moments,
    preprocessing,
)
from .reduce import reduce_statistic
from .statistic import State, tidy_table

__all__ = ["ING_VERSION", "ING_VIEWS", "IngNeurons", "IngOptions", "compute_ing"]

ING_VERSION = 2
ING_VIEWS = ("ing", "ing_neurons", "ing_histograms")

_N_BINS = 100

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class IngOptions:
    """Which neurons are candidates, and what is probed."""

    columns: Literal["real", "all"] = field(
        default="real",
        metadata={
            "help": "The columns of the unembedding: those of real tokens, or also its padding, as the authors do."
        },
    )
    min_kurtosis: float = field(
        default=10.0, metadata={"help": "Kurtosis (Gaussian = 3) above which a neuron is a candidate."}
    )
    min_variance: float = field(
        default=0.005,
        metadata={
            "help": "Variance of the cosines above which it is one, too. A random direction has 1/d_model, so "
            "that in models narrower than 200 all are."
        },
    )
    top: int = field(default=32, metadata={"help": "How many neurons are probed, and in the ensembles."})
    histograms: int = field(default=36, metadata={"help": "Of how many neurons ing_histograms has rows."})
    context: int = field(
        default=24, metadata={"help": "Tokens in front of an example in its document, BOS not counted."}
    )
    examples: int = field(default=10_000, metadata={"help": "Examples of each class, at most."})
    seed: int = field(default=0, metadata={"help": "Seed of examples, folds and random neurons."})

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("histograms", 0), ("context", 1), ("examples", MIN_EXAMPLES)):
            if getattr(self, name) < least:
                raise AnalysisError(f"Option {name} of 'ing' is at least {least}, not {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class IngNeurons:
    """The candidates, the one that sets "-ing" apart most in front."""

    layers: Ints
    units: Ints
    moments: Doubles
    """``[neuron, moment]``: mean, variance, skew and kurtosis of the cosines."""
    means: Doubles
    """``[neuron, 2]``: mean of W_U·w_out over the tokens that end in "-ing", and over the rest."""

    @property
    def differences(self) -> Doubles:
        """``[neuron]``: D, above 0 for a neuron that speaks for "-ing"."""
        return self.means[:, 0] - self.means[:, 1]

    @property
    def effects(self) -> tuple[str, ...]:
        """``promotes`` or ``suppresses``, by the sign of D."""
        return tuple("promotes" if d > 0 else "suppresses" for d in self.differences)

    @classmethod
    def rank(cls, run: Run, moments: State, directions: Doubles, options: IngOptions) -> IngNeurons:
        """Choose the candidates and put them in order. Reads W_out, a layer at a time.

        Parameters
        ----------
        run : Run
            The run whose model it is.
        moments : State
            Of :class:`NeuronStatistic`.
        directions : float64 ``[d_model, 2]``
            Of :func:`mean_directions`.
        options : IngOptions
            What makes a candidate.

        Raises
        ------
        AnalysisError
            There is none.
        """
        _, variance, _, kurtosis = moments.values.T
        chosen = (kurtosis > options.min_kurtosis) | (variance > options.min_variance)
        if not chosen.any():
            raise AnalysisError(
                f"None of the {len(chosen):,} neurons of run {run.run_id} is a candidate: no kurtosis is above "
                f"{options.min_kurtosis:g} (the largest is {np.nanmax(kurtosis):.3g}), and no variance above "
                f"{options.min_variance:g} (the largest is {np.nanmax(variance):.3g}).",
                hint="Lower --min-kurtosis or --min-variance.",
            )
        (layers, units), values = moments.keys[chosen].T, moments.values[chosen]
        means = np.concatenate(
            [
                np.asarray(run.weight_array("W_out")[int(layer)])[units[layers == layer]] @ directions
                for layer in np.unique(layers)
            ]
        )
        order = np.argsort(-np.abs(means[:, 0] - means[:, 1]), kind="stable")
        return cls(layers[order], units[order], values[order], means[order])

    def table(self, options: IngOptions) -> dict[str, Any]:
        """Return the columns of ``ing_neurons``."""
        _, _, skew, kurtosis = self.moments.T
        return {
            "rank": np.arange(1, len(self.layers) + 1, dtype=np.int32),
            "layer": self.layers.astype(np.int32),
            "unit": self.units.astype(np.int32),
            "difference": self.differences,
            "mean_ing": self.means[:, 0],
            "mean_other": self.means[:, 1],
            "effect": list(self.effects),
            **dict(zip(MOMENTS, self.moments.T, strict=True)),
            "class": np.array(CLASSES, dtype=object)[classify_neurons(skew, kurtosis, options.min_kurtosis)],
        }


def mean_directions(folded: npt.NDArray[np.float32], used: Bools, is_ing: Bools) -> Doubles:
    """Return the mean column over the tokens that end in "-ing", and over the rest: ``[d_model, 2]``.

    The mean of W_U·w_out over some tokens is w_out times the mean of their columns.

    Parameters
    ----------
    folded : float32 ``[d_model, vocab]``
        Of :func:`layerlake.analyze.neurons.fold_unembedding`.
    used, is_ing : bool ``[vocab]``
        The columns that are looked at at all, and those that end in "-ing".
    """
    n_ing = np.count_nonzero(is_ing)
    ing = folded[:, is_ing].sum(axis=1, dtype=np.float64)
    every = folded.sum(axis=1, dtype=np.float64, where=used)
    return np.stack([ing / n_ing, (every - ing) / max(np.count_nonzero(used) - n_ing, 1)], axis=1)


def ing_histograms(
    neurons: IngNeurons,
    w_out: npt.NDArray[np.floating],
    folded: npt.NDArray[np.float32],
    used: Bools,
    is_ing: Bools,
) -> dict[str, Any]:
    """Return the columns of ``ing_histograms``: W_U·w_out of the first neurons, split by the token's ending.

    A hundred bins from the least to the greatest value of each neuron.

    Parameters
    ----------
    neurons : IngNeurons
        In order.
    w_out : floating ``[neuron, d_model]``
        Output vectors of the first of them.
    folded, used, is_ing
        As for :func:`mean_directions`.
    """
    counts, edges = [], []
    for vector in w_out:
        scores = vector.astype(np.float32) @ folded
        limits = np.histogram_bin_edges(scores[used], _N_BINS)
        edges.append(limits)
        counts.append([np.histogram(scores[which], limits)[0] for which in (is_ing, used & ~is_ing)])
    n, size = len(w_out), 2 * _N_BINS
    low, high = ([e[part] for e in edges] for part in (slice(None, -1), slice(1, None)))
    return {
        "rank": np.repeat(np.arange(1, n + 1, dtype=np.int32), size),
        "layer": np.repeat(neurons.layers[:n].astype(np.int32), size),
        "unit": np.repeat(neurons.units[:n].astype(np.int32), size),
        "difference": np.repeat(neurons.differences[:n], size),
        "tokens": np.tile(np.repeat(np.array(["ing", "other"], dtype=object), _N_BINS), n),
        "bin": np.tile(np.arange(_N_BINS, dtype=np.int32), 2 * n),
        "low": np.repeat(np.reshape(low, (n, 1, _N_BINS)), 2, axis=1).ravel(),
        "high": np.repeat(np.reshape(high, (n, 1, _N_BINS)), 2, axis=1).ravel(),
        "count": np.reshape(counts, -1).astype(np.int64),
    }


def compute_ing(
    run: Run, options: IngOptions, *, scheduler: str = "threads", progress: bool = False
) -> dict[str, pa.Table]:
    """Compute ``ing``, ``ing_neurons`` and ``ing_histograms`` of one run (columns in docs/analyses.md).

    The moments of all neurons cost as much as the analysis ``neurons``, unless the lake holds its finding of the
    run; the examples are looked for first, so that a run with too few of them is refused before.

    Raises
    ------
    AnalysisError
        No token of the vocabulary ends in "-ing", the run has too few examples, or no neuron is a candidate.
    """
    tokens = IngTokens.open(run)
    examples = find_examples(run, tokens, context=options.context, most=options.examples, seed=options.seed)
    of_neurons = NeuronOptions(columns=options.columns)
    moments = known_moments(run, of_neurons)
    if moments is None:
        statistic = NeuronStatistic.open(run, of_neurons)
        moments = reduce_statistic(statistic, run, scheduler=scheduler, progress=progress)
        del statistic  # and with it a copy of the unembedding
    layernorm = run.shape.norm == "layernorm"
    folded = fold_unembedding(run.weight("W_U"), run.weight("ln_final.w"), layernorm=layernorm)
    used = np.ones_like(tokens.is_ing) if options.columns == "all" else tokens.is_known
    neurons = IngNeurons.rank(run, moments, mean_directions(folded, used, tokens.is_ing), options)
    params: Mapping[str, Any] = {
        **asdict(options),
        **preprocessing(layernorm=layernorm),
        "variant": "authors" if options.columns == "all" else "default",
    }
    n_ing = int(np.count_nonzero(tokens.is_ing))
    counted = {"n_ing_tokens": n_ing, "n_other_tokens": int(np.count_nonzero(used)) - n_ing}
    plotted = list(zip(neurons.layers, neurons.units, strict=True))[: options.histograms]
    w_out = np.array([run.weight_array("W_out")[int(layer), int(unit)] for layer, unit in plotted])
    histograms = ing_histograms(neurons, w_out, folded, used, tokens.is_ing)
    del folded
    found = np.stack([neurons.layers, neurons.units], axis=1)
    heavy = found[neurons.moments[:, 3] > options.min_kurtosis]
    probed = ProbeNeurons.of(found[: options.top], heavy, run.shape.d_mlp, options.seed)
    gather = IngActivationStatistic(examples, probed, tokens, Readout.open(run), run.shape.n_layers, params)
    activations = reduce_statistic(gather, run, scheduler=scheduler, progress=progress).values
    del gather  # and with it the readout
    probes = IngProbeStatistic(
        run.run_id, examples, probed, tokens, neurons.effects[: options.top], activations, params
    )
    return {
        **probes.finalise(reduce_statistic(probes, run, scheduler=scheduler, progress=progress)),
        "ing_neurons": tidy_table(run.run_id, neurons.table(options) | counted, params),
        "ing_histograms": tidy_table(run.run_id, histograms, params),
    }
