"""Subjoiner heads: planted ones, against dense patterns, and what there is too little of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats  # type: ignore[import-untyped]

from layerlake.analyze.analyses import run_analysis
from layerlake.analyze.reduce import compute_tables, reduce_statistic
from layerlake.analyze.subjoiner import (
    SubjoinerOptions,
    SubjoinerStatistic,
    permutation_p_values,
)
from layerlake.catalog.errors import AnalysisError, SiteNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape

Array = npt.NDArray[Any]
Rows = list[dict[str, Any]]

WORDS = [f" {a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
PIECES = [*"qrstuvwxyz"]
VOCAB = ["<bos>", *WORDS, *(f" {piece}" for piece in PIECES), *PIECES]
_HEAD, _PIECE = 1 + len(WORDS), 1 + len(WORDS) + len(PIECES)
_N_DOCUMENTS, _N_WORDS = 24, 30


@pytest.fixture
def shape(shape: ModelShape) -> ModelShape:
    """Three layers of four heads."""
    return replace(shape, n_layers=3, n_heads=4, n_kv_heads=4, d_head=2, n_vocab=len(VOCAB))


def write_text(n_tokens: int = 4, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Documents of one-token words with two words of several tokens in each; and where the latter end."""
    rng = np.random.default_rng(seed)
    documents, ends = [], []
    for _ in range(_N_DOCUMENTS):
        text: list[int] = [0]
        own = []
        for number in range(_N_WORDS):
            if number in (20, 26):
                text.append(_HEAD + int(rng.integers(len(PIECES))))
                text += (_PIECE + rng.integers(0, len(PIECES), n_tokens - 1)).tolist()
                own.append(len(text) - 1)
            else:
                text.append(1 + int(rng.integers(len(WORDS))))
        documents.append(text)
        ends.append(own)
    return documents, ends


def random_patterns(lengths: list[int], shape: ModelShape, seed: int) -> list[Array]:
    """Dense causal patterns ``[layer, head, query, key]`` whose rows sum to 1."""
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        weights = np.tril(rng.gamma(0.5, size=(shape.n_layers, shape.n_heads, n, n)) + 1e-3)
        found.append(weights / weights.sum(axis=-1, keepdims=True))
    return found


def plant(pattern: Array, layer: int, head: int, query: int, n_tokens: int = 4) -> None:
    """Let a query give 0.9 to its word's other tokens, more to the farther."""
    share = np.arange(n_tokens - 1, 0, -1.0)
    row = pattern[layer, head, query]
    row *= 0.1
    row[query - n_tokens + 1 : query] += 0.9 * share / share.sum()


@pytest.fixture
def planted(make_run: Callable[..., Run], shape: ModelShape) -> Callable[..., Run]:
    """Write a run in which head 2 of layer 1 joins the tokens of words; with ``everywhere`` those of all queries."""

    def make(
        *, joins: bool = True, everywhere: bool = False, n_tokens: int = 4, seed: int = 0, **options: Any
    ) -> Run:
        documents, ends = write_text(n_tokens)
        lengths = [len(document) for document in documents]
        patterns = random_patterns(lengths, shape, seed)
        for pattern, own in zip(patterns, ends, strict=True):
            for query in range(n_tokens, len(pattern[0, 0])) if everywhere else own if joins else ():
                plant(pattern, 1, 2, query, n_tokens)
        packed = np.concatenate([p[:, :, *np.tril_indices(p.shape[-1])] for p in patterns], axis=-1)
        given: dict[str, Any] = {"values": {"pattern": packed.astype(np.float32)}, "sites": ["pattern"]}
        return make_run(
            shape=shape, lengths=lengths, token_ids=np.concatenate(documents), vocab=VOCAB, seed=seed,
            context=48, partition_tokens=128, **given | options,
        )  # fmt: skip

    return make


def subjoin(run: Run, **options: Any) -> tuple[Rows, Rows]:
    tables = compute_tables(
        SubjoinerStatistic.open, run, SubjoinerOptions(**options), scheduler="synchronous"
    )
    assert [*tables] == ["subjoiner", "subjoiner_attention"]
    heads, attention = (table.to_pylist() for table in tables.values())
    return heads, attention


@pytest.mark.parametrize("n_tokens", [3, 4, 6])
def test_a_planted_head_is_found_and_no_other(planted: Callable[..., Run], n_tokens: int) -> None:
    heads, attention = subjoin(planted(n_tokens=n_tokens), word_tokens=n_tokens)
    assert [(row["layer"], row["head"]) for row in heads if row["q_value"] < 0.05] == [(1, 2)]
    (best,) = [row for row in heads if row["rank"] == 1]
    assert (best["layer"], best["head"]) == (1, 2)
    assert best["split_weight"] > 0.9
    assert best["split_ordered_fraction"] > 0.6
    assert best["score_lo"] < best["score"] < best["score_hi"]
    assert {(row["layer"], row["head"]) for row in attention} == {(1, 2)}


def test_none_is_found_when_the_classes_are_shuffled(planted: Callable[..., Run]) -> None:
    run = planted()
    statistic = SubjoinerStatistic.open(run, SubjoinerOptions())
    swapped = np.arange(statistic.prompts.n_pairs) % 2 == 1

    def mixed(column: Array) -> Array:
        return np.where(swapped, column[::-1], column)

    names = ("documents", "positions", "rows", "pair_starts", "partitions", "words")
    changes: dict[str, Any] = {name: mixed(getattr(statistic.prompts, name)) for name in names}
    prompts = replace(statistic.prompts, **changes)
    shuffled = replace(statistic, prompts=prompts)
    tables = shuffled.finalise(reduce_statistic(shuffled, run, scheduler="synchronous"))
    assert min(tables["subjoiner"]["q_value"].to_pylist()) >= 0.05


def test_none_is_found_among_random_patterns_or_where_all_words_are_treated_alike(
    planted: Callable[..., Run],
) -> None:
    for run in (planted(joins=False, name="none"), planted(everywhere=True, name="local")):
        heads, _ = subjoin(run)
        assert min(row["q_value"] for row in heads) >= 0.05


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_columns_equal_one_shot_numpy(planted: Callable[..., Run], dtype: str) -> None:
    run = planted(dtype=dtype)
    assert len(run.manifest.partitions) > 3
    heads, attention = subjoin(run, seed=3)
    rows = {row["row"]: (row["document"], row["position"]) for row in run.tokens.to_pylist()}
    prompts = {(row["class"], row["prompt"]): rows[row["row"]] for row in attention}
    n = heads[0]["n_prompts"]
    assert len(prompts) == 2 * n
    dense = {
        (layer, document): run.attention(document, layer).to_numpy().astype(np.float64)
        for layer in range(3)
        for document in range(_N_DOCUMENTS)
    }
    order = np.unique([prompts["split", i][0] for i in range(n)], return_inverse=True)[1]
    for row in heads:
        weights: dict[str, Array] = {}
        between: dict[str, Array] = {}
        for name in ("split", "single"):
            own = [(dense[row["layer"], d][row["head"]], t) for d, t in (prompts[name, i] for i in range(n))]
            weights[name] = np.array([p[t, t - 3 : t + 1] for p, t in own])
            between[name] = np.array(
                [(p[t - 1, t - 3] + p[t - 1, t - 2] + p[t - 2, t - 3]) / 2 for p, t in own]
            )
            ordered = [w[0] > w[1] > w[2] > w[3] for w in weights[name]]
            assert row[f"{name}_ordered_fraction"] == pytest.approx(np.mean(ordered), abs=1e-12)
        difference = (weights["split"] - weights["single"])[:, :3].sum(axis=1)
        assert row["score"] == pytest.approx(difference.mean(), abs=1e-6)
        assert row["single_weight"] == pytest.approx(weights["single"][:, :3].sum(axis=1).mean(), abs=1e-6)
        assert row["intermediate_score"] == pytest.approx(
            (between["split"] - between["single"]).mean(), abs=1e-6
        )
        n_documents = order.max() + 1
        assert row["n_documents"] == n_documents
        sums = np.zeros((n_documents, 2))
        np.add.at(sums, order, np.column_stack([difference, np.ones(n)]))
        drawn = np.random.default_rng(0).integers(0, n_documents, (1000, n_documents))
        replicates = np.divide(*sums[drawn].sum(axis=1).T)
        interval = np.percentile(replicates, [2.5, 97.5])
        assert [row["score_lo"], row["score_hi"]] == pytest.approx(interval, abs=1e-6)
        test = stats.permutation_test(
            (weights["split"][:, :3].sum(axis=1), weights["single"][:, :3].sum(axis=1)),
            lambda a, b, axis: (a - b).mean(axis=axis),
            permutation_type="samples", vectorized=True, alternative="greater", n_resamples=4000, rng=1,
        )  # fmt: skip
        assert row["p_value"] == pytest.approx(test.pvalue, abs=0.03)
    p_values = np.array([row["p_value"] for row in heads])
    by_hand = [
        min(p_values[p_values >= q].tolist(), key=lambda x: x * 12 / (p_values <= x).sum()) for q in p_values
    ]
    expected = [min(1, x * 12 / (p_values <= x).sum()) for x in by_hand]
    assert [row["q_value"] for row in heads] == pytest.approx(expected)
    assert sorted(row["rank"] for row in heads) == [*range(1, 13)]
    assert [row["score"] for row in sorted(heads, key=lambda row: int(row["rank"]))] == sorted(
        (row["score"] for row in heads), reverse=True
    )
    for row in attention:
        document, position = prompts[row["class"], row["prompt"]]
        weight = dense[row["layer"], document][row["head"], position, position - row["distance"]]
        assert row["weight"] == pytest.approx(weight, abs=1e-7)
        assert row["document"] == document


def test_prompts_are_words_with_enough_before_them(planted: Callable[..., Run]) -> None:
    run = planted()
    heads, attention = subjoin(run)
    _, ends = write_text()
    texts = {row["row"]: VOCAB[row["token_id"]] for row in run.tokens.to_pylist()}
    for row in attention:
        n = 4 if row["class"] == "split" else 1
        assert "".join(texts[row["row"] - n + 1 + i] for i in range(n)) == f" {row['word']}"
    assert heads[0]["n_found_split"] == sum(map(len, ends))
    assert heads[0]["n_prompts"] == len({row["word"] for row in attention if row["class"] == "single"})
    ours = next(row for row in subjoin(run, prompts=25, seed=1)[0])
    assert (ours["n_prompts"], ours["seed"], ours["prompts"], ours["variant"]) == (25, 1, 25, "default")


def test_documents_that_are_prompts_are_read_at_their_end(
    make_run: Callable[..., Run], shape: ModelShape
) -> None:
    rng = np.random.default_rng(0)
    documents = [
        [0, *rng.integers(1, 1 + len(WORDS), 17), *([_HEAD + i % 10, _PIECE + i % 9, _PIECE, _PIECE + i // 10] if split
         else [1 + i])]
        for i in range(30)
        for split in (True, False)
    ]  # fmt: skip
    run = make_run(
        shape=shape, lengths=[*map(len, documents)], token_ids=np.concatenate(documents), vocab=VOCAB,
        context=32, partition_tokens=64, sites=["pattern"],
    )  # fmt: skip
    heads, attention = subjoin(run, words=17)
    assert heads[0]["n_prompts"] >= 20
    lengths = {row["document"]: len(documents[row["document"]]) for row in attention}
    starts = dict(zip(*(run.documents[name].to_pylist() for name in ("document", "row_start")), strict=True))
    for row in attention:
        if row["class"] == "split":
            assert row["row"] - starts[row["document"]] == lengths[row["document"]] - 1


def test_permutation_p_values_equal_the_enumeration() -> None:
    differences = np.random.default_rng(0).normal([0.0, 0.5, 1.0, -1.0], size=(9, 4))
    signs = np.array([*itertools.product([1, -1], repeat=9)])
    exact = (signs @ differences >= differences.sum(axis=0) - 1e-9).mean(axis=0)
    p_values, n = permutation_p_values(differences, 50_000, seed=0)
    assert n == 50_000
    assert p_values == pytest.approx(exact, abs=0.01)


def test_p_values_of_nothing_are_uniform_and_few_enough_for_many_heads() -> None:
    p_values, n = permutation_p_values(np.random.default_rng(1).standard_normal((40, 1500)), 100, seed=2)
    assert n == 60_000  # 40 for each of the 1500 heads
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    certain, _ = permutation_p_values(np.column_stack([np.ones((40, 1)), np.zeros((40, 1499))]), 100, seed=2)
    assert certain[0] * 1500 < 0.05
    assert (certain[1:] == 1).all()


def test_too_few_prompts_say_how_many(make_run: Callable[..., Run], planted: Callable[..., Run]) -> None:
    with pytest.raises(
        AnalysisError, match="gives 0 prompts of each class, 20 are needed: it has 0 words of 4"
    ) as error:
        subjoin(make_run(lengths=(20, 30), context=32, partition_tokens=64))
    assert "--sites pattern --max-tokens N" in error.value.hint
    run = planted()
    with pytest.raises(
        AnalysisError, match=r"it has 0 words of 5 tokens \(0 different\) and \d+ of one token"
    ):
        subjoin(run, word_tokens=5)
    with pytest.raises(AnalysisError, match=r"gives 0 .* \(0 different\) with 40 words before them"):
        subjoin(run, words=40)


def test_a_run_without_patterns_says_so(make_run: Callable[..., Run]) -> None:
    lake = Lake(make_run(sites=("resid", "attn_band")).store.url)
    with pytest.raises(SiteNotFound, match="'pattern' not at all") as error:
        run_analysis(lake, "subjoiner")
    assert "--sites pattern" in error.value.hint


def test_values_that_are_not_finite_are_named(planted: Callable[..., Run]) -> None:
    run = planted()
    n_pairs = sum(p.n_pairs for p in run.manifest.partitions)
    values = np.zeros((3, 4, n_pairs), dtype=np.float32)
    values[1, 2] = np.nan
    broken = planted(name="bad", values={"pattern": values})
    with pytest.raises(AnalysisError, match=r"Run bad-\w+ holds \d+ values .* of site 'pattern', layer 1"):
        subjoin(broken)


def test_prompts_of_one_document_have_no_interval(make_run: Callable[..., Run], shape: ModelShape) -> None:
    documents, _ = write_text()
    text = np.concatenate([[0], *(document[1:] for document in documents)])
    run = make_run(
        shape=replace(shape, n_ctx=1024), lengths=[len(text)], token_ids=text, vocab=VOCAB, context=1024,
        partition_tokens=1024, sites=["pattern"],
    )  # fmt: skip
    heads, _ = subjoin(run, per_document=30)
    assert {row["reason"] for row in heads} == {"no intervals: the prompts are all of one document"}
    assert heads[0]["score_lo"] is heads[0]["split_ordered_fraction_hi"] is None
    assert heads[0]["score"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word_tokens": 2}, "word_tokens is at least 3, not 2"),
        ({"word_tokens": 17}, "word_tokens is at most 16, not 17"),
        ({"prompts": 5}, "prompts is at least 20, not 5"),
        ({"per_word": 0}, "per_word is at least 1, not 0"),
        ({"permutations": 0}, "permutations is at least 1, not 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        SubjoinerOptions(**options)
