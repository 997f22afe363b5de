"""Captions of the figures of interventions and of the four stages."""

from __future__ import annotations

from . import intervention_charts, intervention_numbers, stage_charts
from .figure import Figure

__all__ = ["INTERVENTION_FIGURES"]

_MEANS = (
    "Means over the tokens of the evaluation mask. Each intervention begins at the stored residual stream where it "
    "departs from the model’s own order, and is compared with what the last boundary says. "
)
_BANDS = "Bands: 95 % intervals, bootstrap over documents."

INTERVENTION_FIGURES = (
    Figure(
        "intervention_summary",
        "intervention_summary",
        "A layer dropped, two layers swapped",
        intervention_charts.divergence_chart,
        shows="How far the next-token distribution moves, KL(unmodified ‖ intervened), on a logarithmic axis; then "
        "how often its likeliest token stays the same. A dropped layer stands in the middle of its block, two that "
        "are swapped at the boundary between them. Thin, where it is not far below: the floor, what resuming at the "
        "stored residual stream does with nothing changed.",
        computed=_MEANS
        + "Tokens are compared by id. "
        + _BANDS
        + " The table: first choices that stay, and KL; "
        "the middle is relative depth 0.2 to 0.8.",
        reading="The paper finds the first layer indispensable, and the middle ones nearly exchangeable: their models "
        "keep 72 to 95 % of their first choices, and swaps do less than drops (swap − drop below 0).",
        source="Figures 5 and 13; Figure 3 of v1",
        kinds=("drop", "swap"),
        tabulate=intervention_numbers.divergence_numbers,
        remarks_from=("note",),
    ),
    Figure(
        "intervention_summary",
        "intervention_summary",
        "What drops and swaps do to entropy and loss",
        intervention_charts.changes_chart,
        shows="The change of the entropy of the next-token distribution, and of the loss on the token that follows, "
        "intervened less unmodified. The grey line is no change.",
        computed=_MEANS + _BANDS,
        reading="Above the line the model is less sure, or more often wrong. A first layer that is missing leaves a "
        "model that knows nothing and, in the paper, says so: its entropy is high. Less entropy at more loss is a "
        "model that is surer and wrong.",
        source="Figure 3 of v1",
        kinds=("drop", "swap"),
        remarks_from=(),
    ),
    Figure(
        "intervention_summary",
        "intervention_summary",
        "Attention or MLP ablated",
        intervention_charts.divergence_chart,
        shows="The same as for drops where only the attention of a layer, or only its MLP, adds nothing.",
        computed=_MEANS
        + "What is ablated is left out at all positions, biases included; in a sequential block the "
        "MLP then sees what is left, in a parallel one it sees what it saw. " + _BANDS,
        reading="In both models of which the paper shows this, ablating an MLP matters more again in the last layers. "
        "Where a drop does far more than either ablation, the two of a layer stand in for each other.",
        source="Figures 13 to 15 of v1",
        kinds=("ablate_attn", "ablate_mlp"),
        remarks_from=("note",),
    ),
    Figure(
        "intervention_summary",
        "intervention_summary",
        "Blocks of layers repeated",
        intervention_charts.repeats_chart,
        shows="Entropy and loss where each layer of a block runs twice in place, for every block of a length, at the "
        "middle of the block. Dashed: the unmodified model at the same tokens.",
        computed=_MEANS
        + "Repeated layers see their own keys and values; “stale keys” are those of the first time, "
        "which is what the authors’ script measures. " + _BANDS,
        reading="The paper finds that repeated late layers sharpen the output: the entropy falls below the dashed "
        "line. That is better prediction only where the loss falls with it.",
        source="Figures 11, 12c and 24 to 26",
        kinds=("repeat",),
        tabulate=intervention_numbers.repeat_numbers,
        remarks_from=("note",),
    ),
    Figure(
        "swap_cosines",
        "swap_cosines",
        "What swapped layers give, beside what they gave",
        intervention_charts.swap_cosines_chart,
        shows="Of two neighbours that change places: the cosine of what a layer’s attention (left) or MLP (right) "
        "gives with what it gave in its own place, and with what the layer gave whose place it takes; and of the two "
        "as they are.",
        computed="Two blocks are run for each pair, on stored residual streams. Cosines of single tokens, then "
        "averaged; of models with LayerNorm without each vector’s mean. " + _BANDS,
        reading="The paper finds layers of the middle to be much like themselves wherever they stand: high with "
        "itself, low with the other. Where the green line is above the grey one, two layers give more alike from the "
        "same input than each in its place.",
        source="Figures 17 and 18",
    ),
    Figure(
        "benchmarks",
        "benchmarks",
        "Accuracy under interventions",
        intervention_charts.benchmarks_chart,
        shows="The accuracy of each task where a layer is dropped or two are swapped. Dashed: the unmodified model. "
        "The grey line is chance, of four choices; of lambada it is 0.",
        computed="Scored as lm-evaluation-harness does, from the log-probabilities of the answers alone, without "
        "examples in front: acc, not normed by length. Bands: 95 % intervals, 1.96 standard errors over items.",
        reading="Whoever reads these curves should look at the dashed line first: a model that is at chance has "
        "nothing to lose. The paper’s models fall to chance without their first layer, and lose little in the middle.",
        source="Figures 15 and 16",
        tabulate=intervention_numbers.benchmark_numbers,
        remarks_from=(),
    ),
    Figure(
        "stages",
        "stage_curves",
        "The four stages of inference",
        stage_charts.stages_chart,
        shows="What should peak one behind the other: the damage of dropping a layer, attention to near tokens, "
        "prediction neurons, suppression neurons; each as a share of its largest value. Families of several models "
        "first, then each model.",
        computed="Layer l stands at l/(L − 1); values between layers are interpolated linearly. A family’s curve is "
        "the mean over its models, again divided by its maximum. Neurons count by their share of the layer. The first "
        "layer dwarfs the others where KL is linear; dashed, the same as log10(1 + KL).",
        reading="In the paper the four curves peak in this order: at the very first layer, in the first quarter, at "
        "about 85 % of the depth, and at the end. A curve that is missing is named below, with the reason.",
        source="Figure 1",
        is_by_depth=False,
    ),
    Figure(
        "stages",
        "stages",
        "What speaks for and against the stages",
        None,
        shows="For each signature that the paper names or implies, whether it holds in each run.",
        computed="The paper names no tests; these are this project’s, and the same for all models. A peak is the "
        "largest mean, wherever intervals overlap; the statement says where they do.",
        reading="“Against” speaks against this stage in this model, or against the signature. Models with few layers "
        "or little training need not show the stages of large ones.",
        source="Table 1",
        is_by_depth=False,
        tabulate=stage_charts.stage_verdicts,
        remarks_from=("note",),
    ),
)
"""The figures of the report that are of interventions, in their order."""
