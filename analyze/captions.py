"""Captions: which figures the report shows of each analysis, and what it says about them.

Figures of the paper are those of "The Remarkable Robustness of LLMs: Stages of Inference?", arXiv 2406.19384
(v3 unless v1 is named); what the sources leave open, and what was chosen here, is in ``docs/analyses.md``.
"""

from __future__ import annotations

from . import charts, ing_charts, subjoiner_charts
from .figure import Figure
from .intervention_captions import INTERVENTION_FIGURES

__all__ = ["FIGURES", "TITLES"]

TITLES = {
    "lens": ("Logit lens", "where the prediction forms"),
    "cka": ("CKA", "which layers share a representation"),
    "neurons": ("Neurons", "where they speak to the vocabulary"),
    "attention_locality": ("Attention", "how far back it looks"),
    "subjoiner": ("Subjoiner heads", "where the tokens of a word meet"),
    "wic": ("Word in context", "where the sense of a word can be read"),
    "ing": ("The ending -ing", "which neurons speak for it, and what they foretell"),
    "norms": ("Norms", "how much each block adds"),
    "intervention_summary": (
        "Interventions",
        "what the output loses where layers are dropped, swapped or repeated",
    ),
    "swap_cosines": ("Swapped layers", "whether they still give what they gave"),
    "benchmarks": ("Benchmarks", "what is left of the answers"),
    "stages": ("Stages", "what marks the four stages of inference, and what speaks against them"),
}
"""Name and subject of each analysis; the report's sections, in their order."""

_QUERIES = {
    "default": "over the queries from position 17 on, which have BOS farther behind them than any distance shown",
    "authors": "over all queries that have as many tokens before them, as in the paper’s code",
}

FIGURES = (
    Figure(
        "lens",
        "lens",
        "Logit lens",
        charts.lens_chart,
        shows="Every boundary of the residual stream is read as if it were the last one: the final norm and the "
        "unembedding are applied to it, from the embeddings (depth 0) to what the model itself unembeds (depth 1). "
        "First: the entropy of the distribution that comes out, and how far it is from the model’s own. "
        "Then: its loss on the token that follows, and how often its first choice is the model’s.",
        computed="Means over tokens of the evaluation mask (position 1 to the last but one of each document), spread "
        "evenly where not all are taken. {scale} Bands: 95 % intervals, bootstrap over documents.",
        reading="A plateau of high loss and KL says that the layers below it work on something else than the next "
        "token; the fall after it is where the prediction is made. Low entropy alone is not knowledge: where the "
        "unembedding is the embedding, depth 0 is sure of the very token that was read, and its loss is high.",
        source="Figures 7b, 8 and 21",
        choices={
            "scale": {
                "own": "Each boundary is normed by its own statistics, biases included; so depth 1 is the model, "
                "with KL 0, agreement 100 % and the model’s own loss.",
                "final": "Each boundary is divided by the scale of the final residual at the same position, biases "
                "included. Depth 1 is the model itself; residuals shorter than the final one give smaller logits, "
                "and an entropy nearer to log2 of the vocabulary, than their own scale would.",
                "authors": "As in the paper’s published code, each boundary is divided by the scale of the final "
                "residual at the same position, biases are left out, and the entropy clamps probabilities to 1e-9; so "
                "depth 1 is not quite the model, and residuals shorter than the final one have an entropy nearer to "
                "log2 of the vocabulary than their own scale would give them.",
            },
        },
    ),
    Figure(
        "cka",
        "cka",
        "Similarity of representations between boundaries",
        charts.cka_chart,
        shows="Centred kernel alignment (CKA) of every two boundaries of one model; boundary 0 is the embeddings. "
        "Colours span 0 to 1.",
        computed="Linear kernel, unbiased HSIC estimator, averaged over batches before the ratio. {samples} The "
        "tooltip has the value, its 95 % interval (jackknife over batches) and the number of samples.",
        reading="1 means equal up to rotation and scale; the diagonal is 1 by construction. Bright blocks are runs of "
        "layers that keep one representation, their edges the places where it changes. The unbiased estimator can be "
        "a little below 0: such a cell has the colour of 0. A grey cell has no value; its tooltip says why.",
        source="Figures 5b, 5c and 14",
        is_by_depth=False,
        choices={
            "samples": {
                "last_token": "A sample is the last token of a document; batches follow the order of the documents.",
                "tokens_per_doc": "A sample is a token, a batch all tokens of one document, as in the paper’s code.",
            },
        },
    ),
    Figure(
        "neurons",
        "neuron_counts",
        "Prediction and suppression neurons",
        charts.neurons_chart,
        shows="The share of each layer’s neurons whose output weights raise a few tokens far above the rest of the "
        "vocabulary (prediction), or push a few far below it (suppression).",
        computed="From the weights alone: the cosines of a neuron’s output vector with all token directions of the "
        "unembedding. Kurtosis above {threshold} (a Gaussian has 3) and positive skew make a prediction neuron, "
        "negative skew a suppression neuron.",
        reading="The paper finds prediction neurons from the middle on, most of them at about 85 % of the depth, and "
        "suppression neurons taking over in the last layers. Small or briefly trained models may have few of either.",
        source="Figures 1, 8 and 19",
    ),
    Figure(
        "attention_locality",
        "attention_locality",
        "Attention on the previous five tokens, and on BOS",
        charts.attention_locality_chart,
        shows="First: the share of its attention that a token gives to the five tokens before it; dashed, what "
        "attention spread evenly over all tokens up to itself would give them. Then: the share that goes to the first "
        "position (BOS, where the model has one), where models park attention that they have no use for.",
        computed="Attention weights summed over distances 1 to 5, without the token itself; mean over heads and "
        "{variant}. Bands: 95 % intervals, bootstrap over documents.",
        reading="Early layers that join neighbouring tokens lie far above the dashed line. In the paper’s "
        "models the peak is in the first quarter of the depth. What the first position takes is missing elsewhere.",
        source="Figure 1 (purple); Figure 4 of v1",
        choices={"variant": _QUERIES},
    ),
    Figure(
        "attention_locality",
        "attention_locality",
        "Attention on the previous 1, 2, 4, 8 and 16 tokens",
        charts.attention_distance_chart,
        shows="The attention on so many previous tokens together; dashed, what attention spread evenly would give "
        "them. All panels have the same axis.",
        computed="Attention weights summed over distances 1 to k; mean over heads and {variant}. Bands: 95 % "
        "intervals, bootstrap over documents.",
        reading="What a line rises by from one panel to the next is the attention on the tokens between the two "
        "distances. Lines that hardly rise say that the nearest tokens have most of it.",
        source="Figure 6a",
        choices={"variant": _QUERIES},
    ),
    Figure(
        "subjoiner",
        "subjoiner",
        "Subjoiner heads by layer",
        subjoiner_charts.subjoiner_chart,
        shows="Heads in which the last token of a word looks back at the word’s other tokens. First: the score of each "
        "layer’s best head. Then: the share of the layer’s heads that have a score above what chance gives.",
        computed="Score: what the last token of a word of {word_tokens} tokens gives to the word’s other tokens, less "
        "what a word of one token gives to as many tokens before it. The words are found in the text, "
        "{words} words or more into their document, at most {per_document} of a class from one document; each is "
        "paired with one of the other class near it. Heads above chance: q < 0.05, from permutations of the "
        "two labels within pairs, corrected over all heads of the model (Benjamini and Hochberg). Bands: 95 % "
        "intervals, bootstrap over documents.",
        reading="The paper finds such heads in the first layers, where tokens are put together to words. A head that "
        "looks at near tokens whatever they are has a score of about 0, though the best of many is above 0 by chance, "
        "which the band does not know and q does. Words of one token are commoner than words of "
        "several, which pairing does not mend.",
        source="Figure 6b; Figure 9 of v1",
    ),
    Figure(
        "subjoiner",
        "subjoiner_attention",
        "What the best subjoiner head attends to",
        subjoiner_charts.subjoiner_attention_chart,
        shows="The attention of the last token of a word (position −1) to the last 16 positions, in the head with the "
        "highest score of each model. Left: words of several tokens. Right: their partners, words of one token. "
        "The first row is the mean over all prompts of the class, the others ten of them, chosen at random.",
        computed="Attention weights as they were stored; nothing was run again. The words on the left have "
        "{word_tokens} tokens.",
        reading="A subjoiner is bright at the word’s own tokens in the left panel, from position −2 back to the word’s "
        "first, and not at the same positions in the right one. Nothing is filtered here: the paper’s "
        "figure shows prompts that were picked for their attention to the word.",
        source="Figure 6b",
        is_by_depth=False,
    ),
    Figure(
        "wic",
        "wic_summary",
        "Word in context: probes of a word’s sense",
        charts.wic_chart,
        shows="How often a linear probe is right about whether a word means the same in two sentences, from the two "
        "states u and v of the word at one boundary of the residual stream (depth 0: the embeddings). The grey line is "
        "chance. First: the measurement, whose probe sees where u and v differ and where they agree. The others are "
        "its controls.",
        computed="{pooling} Logistic regressions with an L2 penalty, on states standardised by {train_split}, fitted "
        "to that split and tested on the other. C is chosen on a tenth of the words, drawn {seeds} times with a seed; "
        "lines are means over the seeds. Bands: 95 % intervals, bootstrap over seeds and test items.",
        reading="The paper’s accuracy rises, peaks in the middle of the depth and falls; its features are not "
        "published. A probe on u and v alone cannot say whether two senses are equal, whatever they hold: what it has "
        "above chance comes from words and sentences that go with one answer. At depth 0 a word that is written alike "
        "twice is one vector, the position’s embedding apart, and there is nothing to tell by.",
        source="Figures 7a and 20",
        choices={
            "pooling": {
                "last": "The state of a word is that of its last token.",
                "mean": "The state of a word is the mean over its tokens.",
            },
        },
    ),
    Figure(
        "ing",
        "ing",
        "Probes for -ing",
        ing_charts.ing_chart,
        shows="How often a linear probe can tell from neurons whether the token that comes next ends in “-ing”. "
        "Circles: one neuron at a time, light blue for those that write towards such tokens, orange for those against "
        "them. Blue line: the best k together; grey line: as many random neurons of the same layers. Dashed: the model "
        "itself, by its first choice, and by the probability of all such tokens with a tuned threshold.",
        computed="Half of the examples end in “-ing”; the others are as frequent and begin with a blank as often. All "
        "have at least {context} tokens before them, and are read at the last of these. Logistic regressions with an "
        "L2 penalty on standardised activations, fitted to three fifths of the documents; a fifth ranks the neurons, a "
        "fifth is tested, and every document is tested once. The {top} neurons are those whose output weights set such "
        "tokens apart most, among those with kurtosis above {min_kurtosis} or variance above {min_variance}. Bands, "
        "and the bars of circles: 95 % intervals, bootstrap over documents.",
        reading="The paper finds ensembles that are better than the model’s first choice, and single suppression "
        "neurons nearly as good as it. A first choice has to be likelier than every other token, so it is a modest "
        "mark; the tuned probability says what the model knows. Where the grey line is as high as the blue one, the "
        "neurons are nothing special.",
        source="Figure 12a; Figure 10a of v1",
        is_by_depth=False,
    ),
    Figure(
        "ing",
        "ing_histograms",
        "What neurons write at the tokens that end in -ing",
        ing_charts.ing_histograms_chart,
        shows="For the neurons that set the ending apart most: how much one unit of activation adds to the logit of "
        "each token, split by whether the token ends in “-ing”. D is the difference of the two means. Counts are "
        "logarithmic.",
        computed="W_U·w_out from the weights alone, the final norm’s scale folded in, centred. Candidates have a "
        "kurtosis of the cosines above {min_kurtosis}, or a variance above {min_variance}; they are ordered by |D|.",
        reading="Orange to the right of blue, D > 0: the neuron speaks for the ending; to the left, it suppresses it. "
        "A random direction in d dimensions has a variance of 1/d, so in narrow models every neuron is a candidate.",
        source="Figures 9, 10 and 23",
        is_by_depth=False,
    ),
    Figure(
        "norms",
        "norms",
        "Norms of what is added to the residual stream",
        charts.norms_chart,
        shows="The length of the vectors that attention and MLP add, and of the residual stream that they are "
        "added to; then both relative to that stream, and attention relative to the MLP (the line marks equality).",
        computed="Euclidean norms over the tokens of the evaluation mask, position 0 left out; "
        "of models with LayerNorm after subtracting the mean over d_model, which the norm removes. Lines are means "
        "over tokens, and ratios of means. Bands about them: 95 % intervals, bootstrap over documents, often no wider "
        "than the line. The wide, paler bands of the lengths: the tokens themselves, from the 10th to the 90th "
        "percentile. Logarithmic axes.",
        reading="The stream grows with depth, so the same length matters less and less. The paper finds that MLP "
        "outputs grow and peak in the last layers, and that attention weighs most early.",
        source="Figures 12b and 22; Figures 5 and 7 of v1",
    ),
    *INTERVENTION_FIGURES,
)
"""The figures of the report, in their order."""
