"""Results as text."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.sql import format_result, query, write_result

EVERY_TYPE = """
SELECT 0.1::FLOAT AS f, 0.1::DOUBLE AS d, 'nan'::FLOAT AS nan, '-inf'::DOUBLE AS inf, NULL AS nothing,
       sum(3) AS total, 1.50::DECIMAL(5, 2) AS price, true AS yes, ' a"b,' AS text, [0.1::FLOAT, 'nan'] AS list,
       {'x': 0.1::FLOAT, 'y': [1]} AS struct, DATE '2020-01-02' AS day, MAP {'k': 1} AS map, INTERVAL 1 DAY AS span
"""


def test_json_is_one_array_of_objects(tiny_lake: Lake) -> None:
    assert json.loads(format_result(query(tiny_lake, EVERY_TYPE), "json")) == [
        {
            "f": 0.1,
            "d": 0.1,
            "nan": None,
            "inf": None,
            "nothing": None,
            "total": 3,
            "price": 1.5,
            "yes": True,
            "text": ' a"b,',
            "list": [0.1, None],
            "struct": {"x": 0.1, "y": [1]},
            "day": "2020-01-02",
            "map": "{k=1}",
            "span": "1 day",
        }
    ]


def test_csv_reads_back(tiny_lake: Lake) -> None:
    header, row = csv.reader(io.StringIO(format_result(query(tiny_lake, EVERY_TYPE), "csv")))
    assert dict(zip(header, row, strict=True)) == {
        "f": "0.1",
        "d": "0.1",
        "nan": "nan",
        "inf": "-inf",
        "nothing": "",
        "total": "3",
        "price": "1.5",
        "yes": "true",
        "text": ' a"b,',
        "list": "[0.1, NaN]",
        "struct": '{"x": 0.1, "y": [1]}',
        "day": "2020-01-02",
        "map": "{k=1}",
        "span": "1 day",
    }


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_vectors_survive_as_text(tiny_lake: Lake, kind: str) -> None:
    relation = query(tiny_lake, "SELECT vec FROM resid WHERE boundary = 1")
    text = format_result(relation, kind)
    if kind == "json":
        read = [row["vec"] for row in json.loads(text)]
    else:
        read = [json.loads(row["vec"]) for row in csv.DictReader(io.StringIO(text))]
    expected = [row[0] for row in relation.fetchall()]
    np.testing.assert_array_equal(np.array(read, dtype=np.float32), np.array(expected, dtype=np.float32))


def test_no_rows(tiny_lake: Lake) -> None:
    relation = query(tiny_lake, "SELECT 1 AS a, 2 AS b WHERE false")
    assert json.loads(format_result(relation, "json")) == []
    assert format_result(relation, "csv") == "a,b\n"
    assert "0 rows" in format_result(relation)


def test_table_is_a_box_with_a_note_of_what_is_left_out(tiny_lake: Lake) -> None:
    box = format_result(query(tiny_lake, "SELECT row, text FROM tokens"), max_rows=4)
    assert box.count("│ t") == 4
    assert "36 rows" in box
    assert "4 shown" in box
    assert box.endswith("\n")


def test_plan_is_printed_as_it_is_drawn(tiny_lake: Lake) -> None:
    plan = format_result(query(tiny_lake, "EXPLAIN SELECT vec FROM resid WHERE boundary = 1"))
    assert '"boundary" = 1' in plan
    assert "\\n" not in plan


def test_odd_column_names(tiny_lake: Lake) -> None:
    relation = query(tiny_lake, 'SELECT 1 AS "a\n""b", DATE \'2020-01-02\' AS "#1"')
    assert json.loads(format_result(relation, "json")) == [{'a\n"b': 1, "#1": "2020-01-02"}]


def test_error_while_running_is_a_query_error(tiny_lake: Lake) -> None:
    relation = query(tiny_lake, "SELECT error('too far') FROM tokens")
    for kind in ("table", "csv", "json"):
        with pytest.raises(QueryError, match="too far"):
            write_result(relation, kind, io.StringIO())


def test_unknown_format(tiny_lake: Lake) -> None:
    with pytest.raises(QueryError, match="Did you mean 'json'") as caught:
        format_result(query(tiny_lake, "SELECT 1"), "jsn")
    assert "table, csv, json" in caught.value.hint
