"""Documents with values that are not finite are left out where that is asked for, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from tests.analyze import test_ing, test_subjoiner, test_wic
from tests.conftest import TINY, build_run, random_values

from layerlake.analyze.analyses import run_analysis
from layerlake.analyze.nonfinite import find_nonfinite
from layerlake.analyze.report import build_report
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.findings import newest_findings
from layerlake.catalog.lake import Lake
from layerlake.sql import query

Corpus = dict[str, Any]
"""What ``build_run`` makes a run from."""

LENGTHS = (20, 9, 23, 18, 21, 12)


def text() -> Corpus:
    n_tokens = sum(LENGTHS)
    return {
        "lengths": LENGTHS,
        "values": random_values(TINY, n_tokens, LENGTHS, seed=0),
        "token_ids": np.random.default_rng(0).integers(1, TINY.n_vocab, n_tokens),
        "context": 24,
        "partition_tokens": 64,
    }


def word_pairs() -> Corpus:
    """Sixty items of each split, two documents each."""
    items = np.r_[:60, test_wic.N_TRAIN : test_wic.N_TRAIN + 60]
    states = test_wic.STATES[:, items].reshape(3, -1, TINY.d_model)
    n_tokens = states.shape[1]
    return {
        "lengths": [test_wic.LENGTH] * (2 * len(items)),
        "values": {"resid": states},
        "token_ids": np.random.default_rng(0).integers(1, TINY.n_vocab, n_tokens),
        "prompts": [prompt for prompt in test_wic.prompts_of() if prompt.item in items],
        "sites": ["resid"],
        "partition_tokens": 256,
    }


def ing_text() -> Corpus:
    build: Any = lambda _, **given: given  # noqa: E731
    return cast(Corpus, test_ing.planted_run(Path(), TINY, build))


def word_text() -> Corpus:
    shape = replace(TINY, n_heads=4, n_kv_heads=4, d_head=2, n_vocab=len(test_subjoiner.VOCAB), n_ctx=64)
    documents, _ = test_subjoiner.write_text()
    lengths = [len(document) for document in documents]
    patterns = test_subjoiner.random_patterns(lengths, shape, seed=0)
    packed = np.concatenate([p[:, :, *np.tril_indices(p.shape[-1])] for p in patterns], axis=-1)
    return {
        "shape": shape,
        "lengths": lengths,
        "values": {"pattern": packed.astype(np.float32)},
        "token_ids": np.concatenate(documents),
        "vocab": test_subjoiner.VOCAB,
        "sites": ["pattern"],
        "context": 48,
        "partition_tokens": 128,
    }


def split(values: npt.NDArray[Any], site: str, lengths: Sequence[int]) -> list[npt.NDArray[Any]]:
    """The values of each document."""
    n_tokens = np.array(lengths)
    n = n_tokens * (n_tokens + 1) // 2 if site == "pattern" else n_tokens
    return np.split(values, np.cumsum(n)[:-1], axis=2 if site == "pattern" else 1)


def spoil(corpus: Corpus, site: str, place: tuple[int, int, int | slice], *, bad: float = np.nan) -> Corpus:
    """The corpus with values that are not finite, at (document, layer, token or pair of tokens)."""
    document, layer, where = place
    values = corpus["values"][site].copy()
    own = split(values, site, corpus["lengths"])[document]
    own[(layer, 0, where) if site == "pattern" else (layer, where, 0)] = bad
    return corpus | {"values": corpus["values"] | {site: values}}


def without(corpus: Corpus, documents: Sequence[int]) -> Corpus:
    """The corpus as if it never had these documents."""
    lengths = corpus["lengths"]
    good = [i for i in range(len(lengths)) if i not in documents]
    ids = np.split(corpus["token_ids"], np.cumsum(lengths)[:-1])
    changed: Corpus = {
        "lengths": [lengths[i] for i in good],
        "token_ids": np.concatenate([ids[i] for i in good]),
        "values": {
            site: np.concatenate(
                [split(v, site, lengths)[i] for i in good], axis=2 if site == "pattern" else 1
            )
            for site, v in corpus["values"].items()
        },
    }
    if "prompts" in corpus:
        changed["prompts"] = [corpus["prompts"][i] for i in good]
    return corpus | changed


@dataclass(frozen=True)
class Case:
    """An analysis of a corpus in which one document holds values that are not finite."""

    analysis: str
    corpus: Callable[[], Corpus]
    site: str
    place: tuple[int, int, int | slice]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def document(self) -> int:
        """Which of them."""
        return self.place[0]

    @property
    def goes(self) -> list[int]:
        """The documents that go with it: of a pair of sentences both."""
        return [self.document, self.document ^ 1] if self.analysis == "wic" else [self.document]

    def lakes(self, tmp_path: Path) -> tuple[Lake, Lake]:
        """The lake, and one that never had the document."""
        corpus = spoil(self.corpus(), self.site, self.place)
        build_run(tmp_path / "lake", **corpus)
        build_run(tmp_path / "without", **without(corpus, self.goes))
        return Lake(tmp_path / "lake"), Lake(tmp_path / "without")


everywhere = slice(None)
WORD = test_wic.SPAN[1] - 1
WIC, ING, SUBJOINER = {"seeds": 1}, {"min_variance": 1.0, "top": 4}, {"permutations": 100}

UNREADABLE = [
    Case("lens", text, "resid", (1, 1, 3), {"tokens": "all"}),
    Case("norms", text, "mlp_out", (4, 0, slice(5, 7)), {"tokens": "all"}),
    Case("cka", text, "resid", (1, 1, 3), {"samples": "tokens_per_doc"}),
    Case("attention_locality", text, "pattern", (4, 1, 230)),
    Case("wic", word_pairs, "resid", (5, 1, WORD), WIC),
    Case("ing", ing_text, "mlp_post", (7, 1, everywhere), ING),
    Case("subjoiner", word_text, "pattern", (3, 1, everywhere), SUBJOINER),
]
"""What is read cannot be used."""

UNNOTICED = [
    Case("cka", text, "resid", (1, 1, 3), {"batch": 4}),  # reads last tokens
    Case("wic", word_pairs, "resid", (5, 1, 0), WIC),  # reads the words
]
"""What is not finite is not read."""


def test_they_are_found_by_site_and_layer(tmp_path: Path) -> None:
    clean = text()
    bad = spoil(clean, "resid", (1, 1, 3))
    bad = spoil(bad, "mlp_out", (4, 0, slice(5, 7)), bad=np.inf)
    bad = spoil(bad, "pattern", (4, 1, 230))
    run = build_run(tmp_path / "lake", **bad)
    sites = ("resid", "mlp_out", "pattern", "attn_band")
    found = find_nonfinite(run, sites, scheduler="synchronous").to_pylist()
    assert [row for row in found if row["site"] != "attn_band"] == [
        {"document": 1, "site": "resid", "layer": 1, "n_values": 1},
        {"document": 4, "site": "mlp_out", "layer": 0, "n_values": 2},
        {"document": 4, "site": "pattern", "layer": 1, "n_values": 1},
    ]
    assert [row["document"] for row in found if row["site"] == "attn_band"] == [4]
    assert not find_nonfinite(build_run(tmp_path / "clean", **clean), sites).num_rows


def assert_same_numbers(ours: dict[str, pa.Table], theirs: dict[str, pa.Table]) -> None:
    """Of all tables, but for what names runs and documents, and for how many were left out."""
    assert ours.keys() == theirs.keys()
    for view, table in ours.items():
        named = {"run", "document", "row", "n_excluded", "n_left_out"}
        assert table.column_names == theirs[view].column_names
        assert len(table) == len(theirs[view]) > 0
        for column in set(table.column_names) - named:
            a, b = table[column], theirs[view][column]
            if pa.types.is_floating(a.type):
                np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), rtol=1e-6, err_msg=f"{view}: {column}")
            else:
                assert a == b, (view, column)


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda case: case.analysis)
def test_an_analysis_without_them_is_that_of_a_run_without_them(case: Case, tmp_path: Path) -> None:
    lake, other = case.lakes(tmp_path)
    with pytest.raises(AnalysisError, match="not finite") as caught:
        run_analysis(lake, case.analysis, options=case.options)
    assert "--exclude-nonfinite" in caught.value.hint
    found = run_analysis(lake, case.analysis, options=case.options, exclude_nonfinite=True)
    assert all(extent["excluded"] == [case.document] for extent in found.keys[0].extents.values())
    assert_same_numbers(found.tables, run_analysis(other, case.analysis, options=case.options).tables)
    again = run_analysis(lake, case.analysis, options=case.options, exclude_nonfinite=True)
    assert again.tables == found.tables


@pytest.mark.parametrize("case", UNNOTICED, ids=lambda case: case.analysis)
def test_what_was_found_with_them_is_not_built_upon_and_stays(case: Case, tmp_path: Path) -> None:
    lake, other = case.lakes(tmp_path)
    plain = run_analysis(lake, case.analysis, options=case.options)
    found = run_analysis(lake, case.analysis, options=case.options, exclude_nonfinite=True)
    assert_same_numbers(found.tables, run_analysis(other, case.analysis, options=case.options).tables)
    assert found.table.drop_columns("n_excluded") != plain.table.drop_columns("n_excluded")
    again = run_analysis(lake, case.analysis, options=case.options)
    assert again.tables == plain.tables
    view = next(iter(plain.tables))
    shown = query(lake, f"SELECT n_excluded, count(*) FROM {view} GROUP BY ALL ORDER BY ALL")  # noqa: S608
    assert shown.fetchall() == [(0, len(plain.table)), (1, len(found.table))]
    params = query(lake, f"SELECT params->>'n_excluded' FROM findings WHERE view = '{view}' ORDER BY ALL")  # noqa: S608
    assert params.fetchall() == [("0",), ("1",)]


def test_an_item_of_which_a_sentence_is_excluded_is_counted_as_left_out(tmp_path: Path) -> None:
    lake, _ = UNNOTICED[1].lakes(tmp_path)
    counted = {
        exclude: set(
            run_analysis(lake, "wic", options=WIC, exclude_nonfinite=exclude).table["n_left_out"].to_pylist()
        )
        for exclude in (False, True)
    }
    assert counted == {False: {0}, True: {1}}


def test_the_report_s_commands_leave_them_out_too(tmp_path: Path) -> None:
    lake, _ = UNNOTICED[0].lakes(tmp_path)
    options = UNNOTICED[0].options
    run_analysis(lake, "cka", options=options)
    run_analysis(lake, "cka", options=options, exclude_nonfinite=True)
    assert len(newest_findings(lake.findings("cka"))) == 2
    page = build_report(lake)
    for command in ("cka --batch 4", "cka --batch 4 --exclude-nonfinite"):
        assert f"layerlake analyze {lake.url} {command}\n" in page
