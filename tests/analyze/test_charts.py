"""Charts: what lies where, in which colour, and what becomes of values that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pyarrow as pa
import pytest

from layerlake.analyze import charts, ing_charts, subjoiner_charts
from layerlake.analyze.panels import wrapped
from layerlake.analyze.series import Axis, Kind, Row, Series, relative_depth

A, B = Series("a-1", "model a", 2, "gpt2"), Series("b-2", "model b", 4, "gpt2")
C = Series("c-3", "model c", 3, "llama")
INTERVAL = {"_lo": -0.1, "": 0.0, "_hi": 0.1}


def lens_table(*series: Series, entropy: float | None = 3.0) -> pa.Table:
    metrics = ("entropy_bits", "kl_final_lens_nats", "loss_nats", "top1_agreement")
    return pa.Table.from_pylist(
        [
            {"run": item.run, "boundary": i, "scale": "own", "n_tokens": 10}
            | {
                f"{name}{end}": None if entropy is None else entropy + i + d
                for name in metrics
                for end, d in INTERVAL.items()
            }
            for item in series
            for i in range(item.n_layers + 1)
        ]
    )


def cka_table(*series: Series, upper_only: bool = False) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "boundary_a": a, "boundary_b": b, "n_samples": 8, "cka": 1.0 - 0.6 * abs(a - b)}
            | {"cka_lo": None, "cka_hi": None, "reason": "no interval", "note": None}
            for item in series
            for a in range(item.n_layers + 1)
            for b in range(a if upper_only else 0, item.n_layers + 1)
        ]
    )


def counts_table(*series: Series) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": layer, "class": name, "n_units": n, "density": n / 16}
            | {"threshold": 10.0, "min_kurtosis": above}
            for item in series
            for layer in range(item.n_layers)
            for above, least in ((8.0, 1), (10.0, 0))
            for name, n in (("prediction", layer + least), ("other", 16 - layer - least))
        ]
    )


def attention_table(*series: Series, bos: float | None = 0.25) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "run": item.run,
                "layer": layer,
                "distance": k,
                "mean_weight": 0.02,
                "bos_weight": bos,
                "uniform_weight": 0.01 * k,
            }
            | {f"cumulative_weight{end}": 0.02 * k + d / 10 for end, d in INTERVAL.items()}
            for item in series
            for layer in range(item.n_layers)
            for k in range(17)
        ]
    )


def subjoiner_table(*series: Series) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": layer, "head": head, "rank": 4 * layer + 1 + (head + 1) % 4}
            | {"q_value": 0.01 if head > 1 else 0.5, "split_weight": 0.5}
            | {f"score{end}": 0.2 + d for end, d in INTERVAL.items()}
            for item in series
            for layer in range(item.n_layers)
            for head in range(4)
        ]
    )


def subjoiner_attention_table(*series: Series, words: str = "abcdefghijkl") -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": 1, "head": 2, "class": name, "prompt": i, "word": word, "document": 0}
            | {"row": 40 * i, "distance": distance, "weight": (i + 1) / 100 if distance == 3 else 0.0}
            for item in series
            for name in ("split", "single")
            for i, word in enumerate(words)
            for distance in range(16)
        ]
    )


def norms_table(*series: Series, mlp: float = 2.0) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": layer, "component": name, "median_norm": norm}
            | {f"mean_norm{end}": norm * (1 + d) for end, d in INTERVAL.items()}
            | {"p10": norm / 2, "p90": norm * 2, "relative_norm": norm / 8}
            | {"attn_mlp_ratio": 4 / mlp if mlp and name == "attn_out" else None}
            for item in series
            for layer in range(item.n_layers)
            for name, norm in (("attn_out", 4.0), ("mlp_out", mlp), ("resid_pre", 8.0))
        ]
    )


def wic_table(*series: Series) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "layer": i - 1, "boundary": i, "features": features, "n_dev": 638}
            | {f"accuracy{end}": 0.55 + 0.1 * i + d / 10 for end, d in INTERVAL.items()}
            for item in series
            for i in range(item.n_layers + 1)
            for features in ("interaction", "concat", "concat_difference", "cosine")
        ]
    )


def ing_table(*series: Series, heavy: bool = True) -> pa.Table:
    probes = [
        ("ensemble", "random", 3), ("ensemble", "selected", 3), *([("ensemble", "heavy_tailed", 7)] if heavy else []),
        ("model", "top1_is_ing", None), ("model", "p_ing", None), ("model", "p_ing_tuned", None),
        ("model", "top1_exact", None),
    ]  # fmt: skip
    numbers: Row = {"accuracy": 0.7, "accuracy_lo": 0.6, "accuracy_hi": 0.8, "validation_accuracy": 0.7}
    rows: list[Row] = [
        {"probe": probe, "features": features, "k": k} | numbers
        for probe, features, last in probes
        for k in (range(1, last + 1) if last == 3 else [last])
    ]
    singles: list[Row] = [
        {"probe": "neuron", "features": features, "k": 1, "layer": 1, "unit": unit, "effect": effect}
        | numbers
        | {"accuracy": 0.9 - unit / 10, "validation_accuracy": 0.5 + unit / 10}
        for features in ("selected", "random")
        for unit, effect in enumerate(("promotes", "suppresses", "promotes"))
    ]
    empty: Row = {"layer": None, "unit": None, "effect": None}
    return pa.Table.from_pylist(
        [{"run": item.run, **empty, **row} for item in series for row in (*rows, *singles)]
    )


def ing_histograms_table(*series: Series, n_neurons: int = 13) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "run": item.run,
                "rank": rank,
                "layer": rank - 1,
                "unit": 7,
                "difference": -0.123,
                "tokens": tokens,
            }
            | {"bin": i, "low": i / 2, "high": (i + 1) / 2, "count": i}
            for item in series
            for rank in range(1, n_neurons + 1)
            for tokens in ("ing", "other")
            for i in range(3)
        ]
    )


CHARTS: dict[str, tuple[Callable[..., Any], Callable[..., pa.Table]]] = {
    "lens": (charts.lens_chart, lens_table),
    "cka": (charts.cka_chart, cka_table),
    "neurons": (charts.neurons_chart, counts_table),
    "attention": (charts.attention_locality_chart, attention_table),
    "distances": (charts.attention_distance_chart, attention_table),
    "norms": (charts.norms_chart, norms_table),
    "ing": (ing_charts.ing_chart, ing_table),
    "ing, histograms": (ing_charts.ing_histograms_chart, ing_histograms_table),
    "subjoiner": (subjoiner_charts.subjoiner_chart, subjoiner_table),
    "subjoiner, attention": (subjoiner_charts.subjoiner_attention_chart, subjoiner_attention_table),
    "wic": (charts.wic_chart, wic_table),
}
LINES = {"lens": 4, "neurons": 2, "attention": 2, "distances": 5, "norms": 6, "subjoiner": 2, "wic": 4}
"""The charts by depth, with the number of their panels."""

Spec = dict[str, Any]


def draw(
    name: str, *series: Series, table: pa.Table | None = None, validate: bool = False, **options: Any
) -> Spec:
    """The chart as JSON, which has to be strict; validation takes altair half of the time."""
    chart, make = CHARTS[name]
    drawing = chart(make(*series) if table is None else table, series, **options)
    spec: Spec = drawing.to_dict(validate=validate)
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    return spec


@cache
def drawn(name: str, *series: Series) -> Spec:
    """The chart of the default table; drawn once for all tests that only look at it."""
    return draw(name, *series)


def rows_of(spec: Spec) -> list[dict[str, Any]]:
    return [row for rows in spec["datasets"].values() for row in rows]


def encodings(spec: Spec) -> list[dict[str, Any]]:
    """The encodings of all marks."""
    return [layer.get("encoding", {}) for panel in spec["concat"] for layer in panel.get("layer", [panel])]


def y_titles(spec: Spec) -> list[str]:
    titles = (e["y"].get("title") for e in encodings(spec) if "y" in e)
    joined = (" ".join(title) if isinstance(title, list) else title for title in titles)
    return list(dict.fromkeys(title for title in joined if title))


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_pure(name: str) -> None:
    assert draw(name, A, B) == drawn(name, A, B)


@pytest.mark.parametrize("name", CHARTS)
def test_vega_lite_compiles_them(name: str) -> None:
    import vl_convert

    assert vl_convert.vegalite_to_vega(draw(name, A, B, C, validate=True))["marks"]


@pytest.mark.parametrize("name", CHARTS)
def test_no_row_gives_a_chart_that_says_so(name: str) -> None:
    spec = draw(name, A, table=CHARTS[name][1](A).slice(0, 0))
    assert [panel["mark"]["text"] for panel in spec["concat"]] == ["no values"]


@pytest.mark.parametrize("name", LINES)
def test_a_run_has_one_colour(name: str) -> None:
    both = [e["color"] for e in encodings(drawn(name, A, B)) if "color" in e]
    assert both
    for color in both:
        assert color["scale"]["domain"] == ["model a", "model b"]
        assert color["scale"]["range"] == list(charts.series_colors([A, B]).values())
        assert color["legend"]["values"] == ["model a", "model b"]
    # … also where the run before it has nothing to show
    alone = draw(name, A, B, table=CHARTS[name][1](B))
    assert {row["model"] for row in rows_of(alone) if row} == {"model b"}
    color = next(e["color"] for e in encodings(alone) if "color" in e)
    assert color["scale"] == both[0]["scale"]
    assert color["legend"]["values"] == ["model b"]


def test_the_first_seven_colours_differ_and_then_dashes_do() -> None:
    nine = [Series(f"r{i}", f"m{i}", 2, "gpt2") for i in range(9)]
    assert len(set(charts.series_colors(nine[:7]).values())) == 7
    spec = drawn("lens", *nine)
    (dash, *_) = [e["strokeDash"]["scale"]["range"] for e in encodings(spec) if "strokeDash" in e]
    looks = zip(charts.series_colors(nine).values(), map(tuple, dash), strict=True)
    assert len(set(looks)) == 9
    assert not any("strokeDash" in e for e in encodings(draw("lens", *nine[:7])))


@pytest.mark.parametrize("name", CHARTS)
def test_only_the_series_are_drawn(name: str) -> None:
    assert draw(name, A, table=CHARTS[name][1](A, B)) == drawn(name, A)


def test_boundaries_stand_at_i_over_l_and_layers_in_the_middle_of_their_block() -> None:
    lens, neurons = rows_of(drawn("lens", A, B)), rows_of(drawn("neurons", A, B))
    assert [row["depth"] for row in lens if row["model"] == "model a"] == [0, 0.5, 1]
    assert [row["depth"] for row in neurons if row["model"] == "model a"] == [0.25, 0.75]
    assert [row["depth"] for row in neurons if row["model"] == "model b"] == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize(
    ("kind", "span", "axis", "places"),
    [
        ("layer", 1, "depth", [0.125, 0.375, 0.625, 0.875]),
        ("layer", 2, "depth", [0.25, 0.5, 0.75]),
        ("layer", 3, "depth", [0.375, 0.625]),
        ("boundary", 1, "depth", [0, 0.25, 0.5, 0.75, 1]),
        ("layer", 1, "paper", [0, 1 / 3, 2 / 3, 1]),
        ("layer", 2, "paper", [0, 1 / 3, 2 / 3]),
        ("boundary", 1, "paper", [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_where_things_stand_in_four_layers(kind: Kind, span: int, axis: Axis, places: list[float]) -> None:
    stands = [relative_depth(kind, i, 4, axis, span=span) for i in range(len(places))]
    assert stands == pytest.approx(places)


def test_the_only_layer_of_a_model_has_a_place_on_both_axes() -> None:
    assert relative_depth("layer", 0, 1) == 0.5
    assert relative_depth("layer", 0, 1, "paper") == 0


@pytest.mark.parametrize("name", LINES)
def test_charts_by_depth_can_stand_as_in_the_paper(name: str) -> None:
    depths = [row["depth"] for row in rows_of(draw(name, B, axis="paper")) if row]
    layers, boundaries = [0, 0.333333, 0.666667, 1], [0, 0.25, 0.5, 0.75, 1]
    assert depths == (boundaries if name in ("lens", "wic") else layers)


def headers(spec: Spec) -> list[str]:
    """What stands above the columns, panel by panel."""
    return [
        layer["mark"]["text"]
        for panel in spec["concat"]
        for layer in panel["layer"]
        if layer["mark"]["type"] == "text" and layer["mark"].get("baseline") == "bottom"
    ]


@pytest.mark.parametrize("name", LINES)
def test_runs_of_one_family_share_their_panels(name: str) -> None:
    spec = drawn(name, A, B)
    assert len(spec["concat"]) == LINES[name]
    assert headers(spec) == []


@pytest.mark.parametrize("name", LINES)
def test_each_family_has_a_column_on_shared_axes(name: str) -> None:
    spec = drawn(name, A, C, B)
    cells = spec["concat"]
    assert spec["columns"] == 2
    assert len(cells) == 2 * LINES[name]
    assert headers(spec) == ["gpt2", "llama"]
    for i, cell in enumerate(cells):
        is_first, is_last = i % 2 == 0, i >= len(cells) - 2
        for e in encodings({"concat": [cell]}):
            if "scale" in e.get("y", {}):
                assert e["y"]["scale"] == next(y["scale"] for y in axes_of(cells[i - i % 2]))
                assert (e["y"]["title"] is not None) == e["y"]["axis"]["labels"] == is_first
                assert (e["x"]["title"] is not None) == e["x"]["axis"]["labels"] == is_last
        held = {layer["data"]["name"] for layer in (cell, *cell["layer"]) if "data" in layer}
        models = {row["model"] for name in held for row in spec["datasets"][name] if row}
        assert models == ({"model a", "model b"} if is_first else {"model c"})


def axes_of(cell: Spec) -> list[dict[str, Any]]:
    """The encodings of a panel's y axis that say what it looks like."""
    return [e["y"] for e in encodings({"concat": [cell]}) if "scale" in e.get("y", {})]


def test_a_family_without_a_value_says_so_in_its_column() -> None:
    table = pa.concat_tables([attention_table(A), attention_table(C, bos=None)], promote_options="permissive")
    spec = draw("attention", A, C, table=table)
    texts = [
        [layer["mark"]["text"] for layer in panel["layer"] if "no values" in layer["mark"].get("text", "")]
        for panel in spec["concat"]
    ]
    assert texts == [[], [], [], ["no values"]]


@pytest.mark.parametrize("name", CHARTS)
def test_long_names_are_not_cut(name: str) -> None:
    long = Series(
        "a-1", "an-uncommonly-long-name-of-a-model · " + "and-of-the-text-that-it-read" * 4, 2, "gpt2"
    )
    spec = draw(name, long, B)
    titles = [panel["title"] for panel in spec["concat"] if "title" in panel]
    lines: list[Any] = [
        title.get("subtitle", title["text"]) if isinstance(title, dict) else title for title in titles
    ]
    written = ["".join(line).replace(" ", "") for line in lines]
    wanted = long.label.replace(" ", "")
    if name in LINES:
        assert not titles
        assert long.label in next(e["color"]["legend"]["values"] for e in encodings(spec) if "color" in e)
        assert spec["config"]["legend"]["labelLimit"] == 0
    else:
        assert any(wanted in text for text in written)
        assert all(len(part) < 80 for line in lines if isinstance(line, list) for part in line)


def test_texts_are_wrapped_only_where_they_have_to_be() -> None:
    assert wrapped("a short title", 200) == "a short title"
    assert wrapped("attention on the previous 16 tokens", 150) == ["attention on the", "previous 16 tokens"]


def test_lens_shows_units_and_bands() -> None:
    spec = drawn("lens", A)
    assert y_titles(spec) == [
        "entropy of the lens (bits)",
        "KL(final ‖ lens) (nats)",
        "loss of the lens (nats per token)",
        "top-1 agreement with the final",
    ]
    bands = [e for e in encodings(spec) if "y2" in e]
    assert next((e["y"]["field"], e["y2"]["field"]) for e in bands) == ("entropy_bits_lo", "entropy_bits_hi")
    assert len(bands) == 4
    tooltip = {item["field"] for e in encodings(spec) for item in e.get("tooltip", [])}
    assert {"model", "boundary", "depth", "entropy_bits", "entropy_bits_lo", "entropy_bits_hi"} <= tooltip


def test_values_that_are_not_finite_are_gaps() -> None:
    table = lens_table(A)
    column = table.column_names.index("entropy_bits")
    broken = table.set_column(column, "entropy_bits", pa.array([float("nan"), float("inf"), 1.0]))
    assert [row["entropy_bits"] for row in rows_of(draw("lens", A, table=broken))] == [None, None, 1.0]


def test_a_panel_without_a_value_is_left_out() -> None:
    assert y_titles(draw("attention", A, table=attention_table(A, bos=None))) == [
        "attention on the previous 5 tokens"
    ]
    spec = draw("lens", A, table=lens_table(A, entropy=None))
    assert [panel["mark"]["text"] for panel in spec["concat"]] == ["no values"]


def test_cka_colours_span_0_to_1_and_values_stay_as_they_are() -> None:
    spec = drawn("cka", A)
    (color,) = [e["color"] for e in encodings(spec) if "color" in e]
    assert color["scale"] == {"clamp": True, "domain": [0, 1], "scheme": "viridis"}
    values = {(row["a"], row["b"]): row["cka"] for row in rows_of(spec)}
    assert values[0, 2] == values[2, 0] == pytest.approx(-0.2)
    assert values[1, 1] == 1


def test_cka_is_the_same_from_half_a_table() -> None:
    assert rows_of(draw("cka", B, table=cka_table(B, upper_only=True))) == rows_of(drawn("cka", B))


def test_a_cka_cell_without_a_value_is_grey_and_says_why() -> None:
    row = {"run": A.run, "boundary_a": 0, "boundary_b": 0, "n_samples": 8, "cka": None}
    table = pa.Table.from_pylist([row | {"reason": "boundary 0 has no variance"}])
    spec = draw("cka", A, table=table)
    assert rows_of(spec) == [{"a": 0, "b": 0, "n": 8, "note": "boundary 0 has no variance"}]
    filled, void = spec["concat"][0]["layer"]
    assert filled["transform"] == [{"filter": "isValid(datum.cka)"}]
    assert void["transform"] == [{"filter": "!isValid(datum.cka)"}]
    assert void["mark"]["color"] == "#dddddd"


def test_cka_has_one_panel_a_run() -> None:
    assert [panel["title"] for panel in drawn("cka", A, B)["concat"]] == ["model a", "model b"]


def test_a_class_without_a_row_has_density_0() -> None:
    rows = rows_of(drawn("neurons", A))
    assert [(row["prediction"], row["suppression"]) for row in rows] == [(0, 0), (1 / 16, 0)]
    assert [row["prediction_n"] for row in rows] == [0, 1]


def test_attention_is_that_on_the_previous_five_tokens_beside_uniform_attention() -> None:
    rows = rows_of(drawn("attention", A))
    assert [(row["cumulative_weight"], row["uniform_weight"], row["bos_weight"]) for row in rows] == [
        (0.1, 0.05, 0.25)
    ] * 2
    spec = drawn("attention", A)
    drawn_of = [e["y"]["field"] for e in encodings(spec)]
    assert drawn_of == ["cumulative_weight_lo", "uniform_weight", "cumulative_weight", "bos_weight"]
    nine = [Series(f"r{i}", f"m{i}", 2, "gpt2") for i in range(9)]  # some of which have dashes of their own
    for chart in (spec, drawn("attention", *nine)):
        dashes = [e["strokeDash"] for e in encodings(chart) if e["y"]["field"] == "uniform_weight"]
        assert dashes == [{"value": [3, 3]}]


def test_distances_are_those_of_the_paper() -> None:
    spec = drawn("distances", A)
    tokens = [f"attention on the previous {k}" for k in ("token", *(f"{n} tokens" for n in (2, 4, 8, 16)))]
    assert y_titles(spec) == tokens
    (row, _) = rows_of(spec)
    assert [row[f"previous_{k}"] for k in (1, 2, 16)] == [0.02, 0.04, 0.32]
    assert [row[f"uniform_{k}"] for k in (1, 2, 16)] == [0.01, 0.02, 0.16]
    bands = [(e["y"]["field"], e["y2"]["field"]) for e in encodings(spec) if "y2" in e]
    assert bands == [(f"previous_{k}_lo", f"previous_{k}_hi") for k in (1, 2, 4, 8, 16)]
    assert row["previous_1_hi"] == pytest.approx(0.03)


def test_a_layers_best_subjoiner_is_drawn_with_the_share_of_those_found() -> None:
    rows = rows_of(drawn("subjoiner", B))
    assert [(row["head"], row["share"], row["n_found"]) for row in rows] == [(3, 0.5, 2)] * 4
    assert [row["depth"] for row in rows] == [0.125, 0.375, 0.625, 0.875]


def test_subjoiner_heat_maps_show_the_mean_of_all_prompts_and_ten_of_them() -> None:
    spec = drawn("subjoiner, attention", A, B)
    assert [panel["title"] for panel in spec["concat"]] == [
        f"model {name}, layer 1, head 2: words of {kind}"
        for name in "ab"
        for kind in ("several tokens", "one token")
    ]
    cells = next(iter(spec["datasets"].values()))
    assert list(dict.fromkeys(row["word"] for row in cells)) == ["mean of 12", *"abcdefghij"]
    bright = {row["word"]: row["weight"] for row in cells if row["position"] == -4}
    assert bright["mean of 12"] == pytest.approx(0.065)
    assert bright["c"] == 0.03
    assert not any(row["weight"] for row in cells if row["position"] != -4)


def test_prompts_of_one_word_have_rows_of_their_own() -> None:
    cells = rows_of(draw("subjoiner, attention", A, table=subjoiner_attention_table(A, words="aab")))
    assert list(dict.fromkeys(row["word"] for row in cells)) == ["mean of 3", "a (0)", "a (1)", "b"]


def test_norms_have_logarithmic_axes_that_hold_them_and_show_the_ratio() -> None:
    spec = drawn("norms", A)
    (ratio,) = {row["ratio"] for row in rows_of(spec) if row}
    assert ratio == 2
    scales = [e["y"]["scale"] for e in encodings(spec) if "scale" in e["y"]]
    assert all(scale["type"] == "log" for scale in scales)
    low, high = scales[0]["domain"]  # of attn_out, 4, whose tokens reach from 2 to 8
    assert low < 2
    assert high > 8
    low, high = scales[-1]["domain"]  # of the ratio, 2, with the line of equality
    assert low < 1
    assert high > 2


def test_norms_have_the_interval_of_the_mean_over_the_paler_range_of_the_tokens() -> None:
    spec = drawn("norms", A)
    bands = [
        (e["y"]["field"], e["y2"]["field"], e["opacity"]["condition"][0]["value"])
        for e in encodings(spec)
        if "y2" in e
    ]
    assert [band[:2] for band in bands[:2]] == [
        ("attn_out_low", "attn_out_high"),
        ("attn_out_lo", "attn_out_hi"),
    ]
    assert bands[0][2] < bands[1][2]
    (row, _) = [row for row in rows_of(spec) if row]
    ends = [row[f"attn_out_{end}"] for end in ("low", "lo", "hi", "high")]
    assert ends == pytest.approx([2, 3.6, 4.4, 8])
    titles = {
        item["field"]: item["title"]
        for e in encodings(spec)
        for item in e.get("tooltip", [])
        if "title" in item
    }
    assert titles["attn_out_low"] == "10–90 % of the tokens, from"
    assert titles["attn_out_lo"] == "95 % interval, from"


def test_a_norm_of_0_is_a_gap_on_a_logarithmic_axis() -> None:
    spec = draw("norms", A, table=norms_table(A, mlp=0.0))
    assert y_titles(spec) == ["norm of attn_out", "norm of resid_pre", "‖attn_out‖ / ‖resid_pre‖"]


def test_the_data_of_a_chart_is_held_once() -> None:
    for series, n_families in (([A, B], 1), ([A, B, C], 2)):
        shared = [rows for rows in drawn("lens", *series)["datasets"].values() if rows != [{}]]
        assert len(shared) == n_families


def test_probes_have_bands_and_chance_and_an_axis_that_does_not_begin_at_0() -> None:
    spec = drawn("wic", A)
    assert y_titles(spec)[0] == "accuracy, from |u−v| and u⊙v"
    assert len(y_titles(spec)) == 4
    assert [e["y"]["datum"] for e in encodings(spec) if "datum" in e["y"]] == [0.5] * 4
    assert next(e["y2"]["field"] for e in encodings(spec) if "y2" in e) == "interaction_hi"
    assert not any(e["y"]["scale"]["zero"] for e in encodings(spec) if "scale" in e["y"])
    assert [row["depth"] for row in rows_of(spec) if row] == [0, 0.5, 1]


def test_the_probes_of_a_run_have_one_panel_and_its_neurons_stand_in_the_order_of_validation() -> None:
    spec = drawn("ing", A, B)
    assert [panel["title"] for panel in spec["concat"]] == ["model a", "model b"]
    points = [row for row in rows_of(drawn("ing", A)) if "neuron" in row]
    assert [(row["k"], row["neuron"], row["what"], row["accuracy"]) for row in points] == [
        (1, "L1.2", "one neuron for -ing", 0.7),
        (2, "L1.1", "one neuron against -ing", 0.8),
        (3, "L1.0", "one neuron for -ing", 0.9),
    ]
    lines = [row for row in rows_of(drawn("ing", A)) if row and "neuron" not in row]
    assert {(row["what"], row["k"]) for row in lines} == {
        *(("best k of the neurons", k) for k in (1, 2, 3)), *(("best k of random neurons", k) for k in (1, 2, 3)),
        ("the model: its first choice is -ing", None), ("the model: P(-ing) above a tuned threshold", None),
        ("all heavy-tailed neurons of these layers", 7),
    }  # fmt: skip
    without = draw("ing", A, table=ing_table(A, heavy=False))
    assert not any("heavy" in row.get("what", "") for row in rows_of(without))
    legends = [e["color"]["legend"]["values"] for e in encodings(without) if "color" in e]
    assert legends
    assert not any("heavy" in name for legend in legends for name in legend)


def test_single_neurons_have_error_bars() -> None:
    spec = drawn("ing", A)
    (panel,) = spec["concat"]
    (bars,) = [
        layer for layer in panel["layer"] if layer["mark"]["type"] == "rule" and "y2" in layer["encoding"]
    ]
    assert (bars["encoding"]["y"]["field"], bars["encoding"]["y2"]["field"]) == ("lo", "hi")
    points = spec["datasets"][bars["data"]["name"]]
    assert [(row["lo"], row["hi"]) for row in points if "neuron" in row] == [(0.6, 0.8)] * 3


def test_histograms_are_of_the_first_twelve_neurons_or_four_of_many_runs() -> None:
    alone = drawn("ing, histograms", A)
    assert [panel["title"] for panel in alone["concat"]][:2] == ["L0.7: D = -0.12", "L1.7: D = -0.12"]
    assert len(alone["concat"]) == 12
    both = drawn("ing, histograms", A, B)
    assert [panel["title"]["subtitle"] for panel in both["concat"]] == ["model a"] * 12 + ["model b"] * 12
    assert len(drawn("ing, histograms", A, B, C)["concat"]) == 12
    bars = rows_of(alone)
    assert all(row["count"] > 0 for row in bars)  # a logarithmic axis has no place for 0
    assert [row["tokens"] for row in alone["datasets"][alone["concat"][0]["data"]["name"]]] == [
        "other tokens", "other tokens", "end in -ing", "end in -ing",
    ]  # fmt: skip
