"""Figure 1 and the verdicts: whose curves are drawn, and what is said of each signature."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from layerlake.analyze.series import Series
from layerlake.analyze.stage_charts import stage_verdicts, stages_chart

A, B, C = (
    Series("a-1", "model a", 4, "gpt2"),
    Series("b-2", "model b", 5, "gpt2"),
    Series("c-3", "model c", 3, "llama"),
)
CURVES = ("kl_drop", "attention_previous_5", "prediction_density", "suppression_density")

Spec = dict[str, Any]


def numbers(i: int) -> dict[str, Any]:
    return {"depth": i / 4, "value": 1 - i / 4, "raw": 8.0 - 2 * i}


def curves(*series: Series, names: tuple[str, ...] = CURVES) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "model": item.label, "model_id": item.run, "family": item.family, "curve": name}
            | numbers(i)
            | {"variant": variant, "unit": "nats"}
            for item in series
            for name in names
            for variant in (("default", "without_layer_0", "log") if name == "kl_drop" else ("default",))
            for i in range(5)
        ]
    )


def verdicts(*series: Series) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"run": item.run, "stage": stage, "signature": name, "expected": "largest", "holds": holds}
            | {"statement": f"{name} of {item.label}", "note": None}
            for item in series
            for stage, name, holds in ((1, "first", True), (4, "last", False), (None, "order", None))
        ]
    )


def draw(table: pa.Table, *series: Series) -> Spec:
    spec: Spec = stages_chart(table, series).to_dict(validate=False)
    assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    return spec


def titles(spec: Spec) -> list[str]:
    return [panel["title"] for panel in spec["concat"]]


def rows_of(spec: Spec) -> list[dict[str, Any]]:
    return [row for rows in spec["datasets"].values() for row in rows]


def test_vega_lite_compiles_it() -> None:
    import vl_convert

    spec = stages_chart(curves(A, B, C), (A, B, C)).to_dict()  # which validates
    assert vl_convert.vegalite_to_vega(spec)["marks"]
    empty = draw(curves(A).slice(0, 0), A)
    assert [panel["mark"]["text"] for panel in empty["concat"]] == ["no values"]


def test_a_family_of_several_models_has_a_panel_before_those_of_the_runs() -> None:
    assert titles(draw(curves(A, C, B), A, B, C)) == [
        "gpt2, mean of 2 models",
        "model a",
        "model b",
        "model c",
    ]
    assert titles(draw(curves(A, B, C), C, A)) == [
        "model c",
        "model a",
    ]  # in the order of the series, no others


def test_four_curves_and_the_logarithm_of_the_first_lie_within_0_and_1() -> None:
    spec = draw(curves(A), A)
    rows = rows_of(spec)
    assert list(dict.fromkeys(row["what"] for row in rows)) == [
        "KL of dropping the layer", "… as log10(1 + KL)", "attention to the previous 5 tokens", "prediction neurons",
        "suppression neurons",
    ]  # fmt: skip
    own = [(row["depth"], row["value"], row["raw"]) for row in rows if row["what"] == "suppression neurons"]
    assert own == [(0, 1, 8), (0.25, 0.75, 6), (0.5, 0.5, 4), (0.75, 0.25, 2), (1, 0, 0)]
    (line,) = [layer["encoding"] for layer in spec["concat"][0]["layer"] if "tooltip" in layer["encoding"]]
    assert line["y"]["scale"]["domain"] == [0, 1]
    dashes = line["strokeDash"]["scale"]
    assert dict(zip(dashes["domain"], dashes["range"], strict=True))["… as log10(1 + KL)"] != [1, 0]


@pytest.mark.parametrize("missing", CURVES)
def test_a_curve_that_is_not_known_is_not_in_the_legend(missing: str) -> None:
    spec = draw(curves(A, names=tuple(name for name in CURVES if name != missing)), A)
    (line,) = [layer["encoding"] for layer in spec["concat"][0]["layer"] if "tooltip" in layer["encoding"]]
    assert len(line["color"]["scale"]["domain"]) == (3 if missing == "kl_drop" else 4)


def test_verdicts_are_by_signature_and_then_by_run() -> None:
    found = stage_verdicts(verdicts(B, A), [A, B])
    assert [line[:4] for line in found.rows] == [
        ("1", "first: largest", "model a", "holds"),
        ("1", "first: largest", "model b", "holds"),
        ("4", "last: largest", "model a", "against"),
        ("4", "last: largest", "model b", "against"),
        ("all", "order: largest", "model a", "unknown"),
        ("all", "order: largest", "model b", "unknown"),
    ]
    assert found.rows[0][4] == "first of model a"
    assert len(found.header) == 5
