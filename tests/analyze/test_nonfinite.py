"""Documents with values that are not finite are left out where that is asked for, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from layerlake.analyze.analyses import run_analysis
from layerlake.analyze.nonfinite import find_nonfinite
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.catalog.sites import SITES

LENGTHS = (20, 9, 23, 18, 21, 12)
BAD = (1, 4)
"""Documents that are spoiled: one in the middle of a partition, one that ends one."""

Values = dict[str, np.ndarray[Any, np.dtype[Any]]]


def values_of(run: Run) -> Values:
    """All values, documents one after the other."""
    read: Values = {}
    for site in (name for name in run.sites if SITES[name].is_array):
        axis = 2 if site == "pattern" else 1
        layers = range(run.array(site).shape[0])
        parts = [np.stack([run.read(site, i, p) for i in layers]) for p in run.manifest.partitions]
        read[site] = np.concatenate(parts, axis=axis)
    return read


def of_documents(values: Values, numbers: list[int]) -> Values:
    """The values of some documents."""
    n_tokens = np.array(LENGTHS)
    picked: Values = {}
    for site, value in values.items():
        n = n_tokens * (n_tokens + 1) // 2 if site == "pattern" else n_tokens
        pieces = np.split(value, np.cumsum(n)[:-1], axis=2 if site == "pattern" else 1)
        picked[site] = np.concatenate([pieces[i] for i in numbers], axis=2 if site == "pattern" else 1)
    return picked


@pytest.fixture
def spoiled(make_run: Callable[..., Run], tmp_path: Path) -> tuple[Run, Run]:
    """A run in which two documents hold NaN and infinities, and one that never had these documents."""
    size: dict[str, Any] = {"context": 24, "partition_tokens": 64}
    clean = make_run(url=tmp_path / "clean", lengths=LENGTHS, **size)
    values, ids = values_of(clean), clean.tokens["token_id"].to_numpy()
    starts = np.cumsum((0, *LENGTHS))
    good = [i for i in range(len(LENGTHS)) if i not in BAD]
    kept = np.concatenate([ids[starts[i] : starts[i + 1]] for i in good])
    without = make_run(
        url=tmp_path / "without", lengths=[LENGTHS[i] for i in good], values=of_documents(values, good),
        token_ids=kept, **size,
    )  # fmt: skip
    bad = {site: value.copy() for site, value in values.items()}
    bad["resid"][1, starts[1] + 3, 2] = np.nan
    bad["mlp_out"][0, starts[4] + 5 : starts[4] + 7, 0] = np.inf
    pairs = np.cumsum([0, *(n * (n + 1) // 2 for n in LENGTHS)])
    bad["pattern"][1, 0, pairs[4] + 230] = np.nan
    return make_run(url=tmp_path / "lake", lengths=LENGTHS, values=bad, token_ids=ids, **size), without


def test_they_are_found_by_site_and_layer(spoiled: tuple[Run, Run]) -> None:
    run, without = spoiled
    found = find_nonfinite(
        run, ("resid", "mlp_out", "pattern", "attn_band"), scheduler="synchronous"
    ).to_pylist()
    assert [row for row in found if row["site"] != "attn_band"] == [
        {"document": 1, "site": "resid", "layer": 1, "n_values": 1},
        {"document": 4, "site": "mlp_out", "layer": 0, "n_values": 2},
        {"document": 4, "site": "pattern", "layer": 1, "n_values": 1},
    ]
    assert [row["document"] for row in found if row["site"] == "attn_band"] == [4]
    assert not find_nonfinite(without, ("resid", "pattern", "attn_band")).num_rows


@pytest.mark.parametrize(
    ("name", "options", "excluded"),
    [
        ("lens", {"tokens": "all"}, [1]),
        ("norms", {"tokens": "all"}, [1, 4]),
        ("cka", {"samples": "tokens_per_doc"}, [1]),
        ("attention_locality", {}, [4]),
    ],
)
def test_an_analysis_without_them_is_that_of_a_run_without_them(
    spoiled: tuple[Run, Run], name: str, options: dict[str, Any], excluded: list[int]
) -> None:
    run, without = spoiled
    lake = Lake(run.store.url)
    with pytest.raises(AnalysisError, match="not finite") as caught:
        run_analysis(lake, name, options=options)
    assert "--exclude-nonfinite" in caught.value.hint

    found = run_analysis(lake, name, options=options, exclude_nonfinite=True)
    assert all(extent["excluded"] == excluded for extent in found.keys[0].extents.values())
    if excluded == [1, 4]:
        expected = run_analysis(Lake(without.store.url), name, options=options).table
        for column in set(expected.column_names) - {"run"}:
            assert_close(found.table[column], expected[column])
    elif name != "cka":  # whose table counts samples
        assert set(found.table["n_documents"].to_pylist()) == {{"lens": 5, "attention_locality": 3}[name]}
    again = run_analysis(lake, name, options=options, exclude_nonfinite=True)
    assert again.tables == found.tables


def assert_close(a: pa.ChunkedArray, b: pa.ChunkedArray) -> None:
    if pa.types.is_floating(a.type):
        np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), rtol=1e-6, equal_nan=True)
    else:
        assert a == b
