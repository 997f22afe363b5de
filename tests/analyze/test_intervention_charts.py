"""Charts of interventions: what stands where, beside which baseline, and what the numbers below them say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from layerlake.analyze import intervention_charts as charts
from layerlake.analyze import intervention_numbers as numbers
from layerlake.analyze.figure import Figure
from layerlake.analyze.intervention_captions import INTERVENTION_FIGURES
from layerlake.analyze.series import Row, Series

A, B, C = (
    Series("a-1", "model a", 4, "gpt2"),
    Series("b-2", "model b", 5, "gpt2"),
    Series("c-3", "model c", 3, "llama"),
)
SPANS = {"drop": 1, "swap": 2, "ablate_attn": 1, "ablate_mlp": 1, "repeat": 3}
KIND_OF_TITLE = {"drop": "a layer dropped", "swap": "two swapped", "ablate_mlp": "without MLP"}

Spec = dict[str, Any]


def summary_row(item: Series, kind: str, layer: int, **changes: Any) -> Row:
    """One row; what it holds can be told from kind and layer."""
    at = 0.01 * (layer + 1) * SPANS[kind]
    row: Row = {"run": item.run, "kind": kind, "layer": layer, "span": SPANS[kind], "variant": "default"}
    row |= {"n_tokens": 100, "kl_noop_nats": 1e-7, "note": None}
    for name, value in (
        ("kl_nats", at), ("agreement", 1 - at), ("entropy_bits", 3 + at), ("delta_entropy_bits", at),
        ("loss_nats", 4 + at), ("delta_loss_nats", 2 * at),
    ):  # fmt: skip
        row |= {f"{name}_lo": value - 0.005, name: value, f"{name}_hi": value + 0.005}
    return row | changes


def summary(*series: Series, kinds: tuple[str, ...] = ("drop", "swap")) -> pa.Table:
    """A row for every place of each kind, and the rows that no chart shows."""
    rows = [
        summary_row(item, kind, layer)
        for item in series
        for kind in kinds
        for layer in range(item.n_layers - SPANS[kind] + 1)
    ]
    hidden = [
        summary_row(item, "drop", 0) | {"kind": kind, "layer": None, "span": None, "kl_nats": 99.0}
        for item in series
        for kind in ("none", "noop", "schedule")
    ]
    return pa.Table.from_pylist(rows + hidden)


def benchmarks(*series: Series, task: str = "arc_easy", splits: tuple[str | None, ...] = (None,)) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "task": task, "split": split, "kind": kind, "layer": layer}
            | {"span": None if layer is None else 1, "variant": "default", "n_items": 50}
            | {"acc": acc, "acc_stderr": 0.05}
            for item in series
            for split in splits
            for kind, layer, acc in (
                ("none", None, 0.6),
                *(("drop", i, 0.02 + 0.1 * i) for i in range(item.n_layers)),
            )
        ]
    )


def cosines(*series: Series) -> pa.Table:
    kinds = ("self_earlier", "self_later", "index_earlier", "index_later", "adjacent")
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": layer, "component": component, "kind": kind, "n_tokens": 10}
            | {"cosine": 0.9 - 0.2 * i, "cosine_lo": 0.8 - 0.2 * i, "cosine_hi": 1 - 0.2 * i}
            for item in series
            for layer in range(item.n_layers - 1)
            for component in ("attn", "mlp")
            for i, kind in enumerate(kinds)
        ]
    )


CHARTS: dict[str, tuple[Callable[..., Any], Callable[..., pa.Table]]] = {
    "divergence": (charts.divergence_chart, summary),
    "changes": (charts.changes_chart, summary),
    "repeats": (charts.repeats_chart, lambda *s: summary(*s, kinds=("repeat",))),
    "benchmarks": (charts.benchmarks_chart, benchmarks),
    "cosines": (charts.swap_cosines_chart, cosines),
}


def draw(name: str, *series: Series, table: pa.Table | None = None, **options: Any) -> Spec:
    chart, make = CHARTS[name]
    spec: Spec = chart(make(*series) if table is None else table, series, **options).to_dict(validate=False)
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    return spec


def rows_of(spec: Spec) -> list[Row]:
    return [row for rows in spec["datasets"].values() for row in rows if row]


def layers_of(panel: Spec) -> list[Spec]:
    return [layer for layer in panel["layer"] if "encoding" in layer]


def line_of(panel: Spec) -> dict[str, Any]:
    """The encoding of a panel's line: the one with a tooltip."""
    (encoding,) = [layer["encoding"] for layer in layers_of(panel) if "tooltip" in layer["encoding"]]
    return dict(encoding)


def text(title: str | list[str]) -> str:
    return " ".join(title) if isinstance(title, list) else title


def titles(spec: Spec) -> list[str]:
    return [text(line_of(panel)["y"]["title"]) for panel in spec["concat"]]


def points(spec: Spec, i: int) -> list[tuple[float, float]]:
    """Where a panel's line goes."""
    encoding = line_of(spec["concat"][i])
    x, y = encoding["x"]["field"], encoding["y"]["field"]
    return [(row[x], row[y]) for row in rows_of(spec) if row.get(y) is not None]


@pytest.mark.parametrize("name", CHARTS)
def test_vega_lite_compiles_them_and_they_are_pure(name: str) -> None:
    import vl_convert

    chart, make = CHARTS[name]
    spec = chart(make(A, B, C), (A, B, C)).to_dict()  # which validates
    assert vl_convert.vegalite_to_vega(spec)["marks"]
    assert spec == draw(name, A, B, C)


@pytest.mark.parametrize("name", CHARTS)
def test_no_row_gives_a_chart_that_says_so(name: str) -> None:
    spec = draw(name, A, table=CHARTS[name][1](A).slice(0, 0))
    assert [panel["mark"]["text"] for panel in spec["concat"]] == ["no values"]


@pytest.mark.parametrize("name", CHARTS)
def test_only_the_series_are_drawn(name: str) -> None:
    assert draw(name, A, table=CHARTS[name][1](A, B)) == draw(name, A)


def test_drops_and_swaps_stand_beside_each_other_each_in_its_place() -> None:
    spec = draw("divergence", A)
    assert titles(spec) == [
        "KL (nats), a layer dropped", "KL (nats), two swapped",
        "same first choice, a layer dropped", "same first choice, two swapped",
    ]  # fmt: skip
    assert points(spec, 0) == [(0.125, 0.01), (0.375, 0.02), (0.625, 0.03), (0.875, 0.04)]
    assert points(spec, 1) == [(0.25, 0.02), (0.5, 0.04), (0.75, 0.06)]
    assert points(spec, 3) == [(0.25, 0.98), (0.5, 0.96), (0.75, 0.94)]
    paper = draw("divergence", A, axis="paper")
    thirds = [0, 0.333333, 0.666667, 1]
    assert [[x for x, _ in points(paper, i)] for i in (0, 1)] == [thirds, thirds[:3]]


def test_divergences_share_a_logarithmic_axis_and_have_bands() -> None:
    kl, kl_of_swaps, agreement, _ = draw("divergence", A)["concat"]
    scales = [line_of(panel)["y"]["scale"] for panel in (kl, kl_of_swaps)]
    assert scales[0] == scales[1]
    assert scales[0]["type"] == "log"
    assert "type" not in line_of(agreement)["y"]["scale"]
    (band,) = [layer["encoding"] for layer in layers_of(kl) if "y2" in layer["encoding"]]
    assert (band["y"]["field"], band["y2"]["field"]) == ("drop_1_kl_nats_lo", "drop_1_kl_nats_hi")


@pytest.mark.parametrize(("floor", "is_on_axis"), [(1e-7, False), (0.004, True)])
def test_the_floor_is_thin_and_the_axis_does_not_reach_far_down_for_it(
    floor: float, is_on_axis: bool
) -> None:
    table = pa.Table.from_pylist([summary_row(A, "drop", i, kl_noop_nats=floor) for i in range(4)])
    panel = draw("divergence", A, table=table)["concat"][0]
    drawn = {layer["encoding"].get("y", {}).get("field"): layer for layer in layers_of(panel)}
    thin = drawn["drop_1_kl_noop_nats"]
    assert thin["mark"]["strokeWidth"] < 1
    assert thin["mark"]["clip"] is True
    assert (line_of(panel)["y"]["scale"]["domain"][0] < floor) is is_on_axis
    assert {"drop_1_kl_noop_nats"} <= {item["field"] for item in line_of(panel)["tooltip"]}


def test_of_several_rows_of_one_intervention_that_of_the_most_tokens_is_drawn() -> None:
    few = [summary_row(A, "drop", 1, n_tokens=n, kl_nats=kl) for n, kl in ((5, 7.0), (500, 8.0), (50, 9.0))]
    assert points(draw("divergence", A, table=pa.Table.from_pylist(few)), 0) == [(0.375, 8.0)]


def test_changes_have_a_line_at_none() -> None:
    spec = draw("changes", A)
    assert titles(spec)[0] == "change of entropy (bits), a layer dropped"
    for panel in spec["concat"]:
        marks = [layer["encoding"]["y"] for layer in layers_of(panel) if "y" in layer["encoding"]]
        assert {"datum": 0.0} in marks
        assert line_of(panel)["y"]["scale"]["domain"][0] <= 0


def test_each_block_length_is_beside_the_unmodified_model_at_the_same_tokens() -> None:
    rows = [summary_row(B, "repeat", i) for i in range(3)]
    rows += [summary_row(B, "repeat", 0, span=5), summary_row(B, "repeat", 0, variant="authors")]
    spec = draw("repeats", B, table=pa.Table.from_pylist(rows))
    assert titles(spec) == [
        f"{name}, blocks of {blocks}"
        for blocks in ("3 repeated", "3 repeated (stale keys)", "5 repeated")
        for name in ("entropy (bits)", "loss (nats)")
    ]
    assert points(spec, 0) == [(0.3, 3.03), (0.5, 3.06), (0.7, 3.09)]  # at the middle of the block
    assert points(spec, 4) == [(0.5, 3.03)]
    dashed = [layer for layer in layers_of(spec["concat"][1]) if "strokeDash" in layer["encoding"]]
    (baseline,) = {layer["encoding"]["y"]["field"] for layer in dashed}
    values = [row[baseline] for row in rows_of(spec) if row.get(baseline) is not None]
    assert values == pytest.approx([4 - 0.03, 4 - 0.06, 4 - 0.09])


def test_accuracies_have_bands_within_0_and_1_the_unmodified_model_and_chance() -> None:
    spec = draw("benchmarks", A)
    (panel,) = spec["concat"]
    assert titles(spec) == ["arc_easy, a layer dropped"]
    assert points(spec, 0) == [(0.125, 0.02), (0.375, 0.12), (0.625, 0.22), (0.875, 0.32)]
    first = rows_of(spec)[0]
    name = line_of(panel)["y"]["field"]
    assert (first[f"{name}_lo"], first[f"{name}_hi"]) == (0, pytest.approx(0.02 + 1.96 * 0.05))
    fields = [layer["encoding"].get("y", {}) for layer in layers_of(panel)]
    assert {"datum": 0.25} in fields
    (dashed,) = [y["field"] for y in fields if str(y.get("field")).endswith("unmodified")]
    assert {row[dashed] for row in rows_of(spec)} == {0.6}


def test_lambada_has_no_chance_and_each_split_a_panel() -> None:
    lambada = draw("benchmarks", A, table=benchmarks(A, task="lambada"))
    assert "datum" not in json.dumps(lambada)
    split = draw("benchmarks", A, table=benchmarks(A, splits=("dev", "test")))
    assert titles(split) == ["arc_easy dev, a layer dropped", "arc_easy test, a layer dropped"]


def test_cosines_of_a_run_are_beside_each_other_at_the_boundary_between_the_layers() -> None:
    spec = draw("cosines", A, C)
    assert [text(panel["title"]) for panel in spec["concat"]] == [
        f"{name}: {part}" for name in ("model a", "model c") for part in ("attn", "mlp")
    ]
    first = spec["datasets"][line_of_data(spec["concat"][0])]
    own = [row for row in first if row["what"] == "with itself, moved forward"]
    assert [(row["depth"], row["value"], row["lo"], row["layer"]) for row in own] == [
        (0.25, 0.9, 0.8, 0), (0.5, 0.9, 0.8, 1), (0.75, 0.9, 0.8, 2),
    ]  # fmt: skip
    assert len({row["what"] for row in first}) == 5


def line_of_data(panel: Spec) -> str:
    """The name of the data of a panel, or of its layers."""
    return str(panel.get("data", panel["layer"][0].get("data"))["name"])


def test_numbers_of_the_middle_are_those_within_its_depth() -> None:
    table = numbers.divergence_numbers(summary(B), [A, B])
    (line,) = table.rows
    assert line == (
        "model b", "99%, 0.01 nats", "96%–98%, 0.02–0.04 nats", "98%, 0.02 nats", "94%–96%, 0.04–0.06 nats",
        "+0.03 nats", "1e-07 nats",
    )  # fmt: skip
    assert len(table.header) == len(line)
    only = numbers.divergence_numbers(pa.Table.from_pylist([summary_row(B, "drop", 2)]), [B])
    assert only.rows == [("model b", "–", "97%, 0.03 nats", "–", "–", "–", "1e-07 nats")]


def test_numbers_of_repeats_name_the_block_that_sharpens_most() -> None:
    rows = [summary_row(B, "repeat", i, delta_entropy_bits=d) for i, d in enumerate((0.2, -0.1, -0.3))]
    table = numbers.repeat_numbers(pa.Table.from_pylist(rows), [B])
    assert table.rows == [("model b", "3", "2 of 3", "layers 2–4: -0.3 bits, loss +0.18 nats")]


def test_numbers_of_benchmarks_begin_with_the_unmodified_model() -> None:
    table = numbers.benchmark_numbers(benchmarks(A), [A])
    assert table.rows == [("model a", "arc_easy", "50", "60.0% ± 5.0%", "2%", "12%–22%", "–")]
    assert len(table.header) == len(table.rows[0])


@pytest.mark.parametrize("figure", INTERVENTION_FIGURES, ids=lambda figure: figure.title)
def test_a_figure_of_kinds_shows_these_alone(figure: Figure) -> None:
    if figure.kinds:
        assert set(figure.select(summary(A, kinds=tuple(SPANS)))["kind"].to_pylist()) == set(figure.kinds)
    else:
        table = pa.table({"run": ["a"]})
        assert figure.select(table) is table
