"""Results as text."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.cli import main
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


def test_markdown_is_one_line_a_row(tiny_lake: Lake) -> None:
    text = r"""
        SELECT 0.1::FLOAT AS f, NULL AS nothing, E'a|b\n\\c' AS text, [1, 2]::FLOAT[2] AS v
        UNION ALL SELECT 'nan'::FLOAT, 1, 'd', NULL"""
    assert format_result(query(tiny_lake, text), "markdown").splitlines() == [
        "| f | nothing | text | v |",
        "| ---: | ---: | --- | --- |",
        r"| 0.1 |  | a\|b\n\\c | [1.0, 2.0] |",
        "| nan | 1 | d |  |",
    ]


def test_parquet_keeps_the_types_and_every_bit(tiny_lake: Lake) -> None:
    text = """
        SELECT vec, text, 0.1::FLOAT AS f, 'nan'::DOUBLE AS nan, 1.50::DECIMAL(5, 2) AS price, DATE '2020-01-02' AS day,
               lens_top(vec, 2) AS top
        FROM resid WHERE boundary = 1"""
    relation, file = query(tiny_lake, text), io.BytesIO()
    write_result(relation, "parquet", file)
    read = pq.read_table(file)
    assert read.schema.field("vec").type == pa.list_(pa.float32(), 8)
    assert read.schema.field("price").type == pa.decimal128(5, 2)
    assert read.schema.equals(relation.to_arrow_table().schema)
    assert str(read.to_pylist()) == str(relation.to_arrow_table().to_pylist())


def test_what_parquet_cannot_hold_is_said(tiny_lake: Lake) -> None:
    with pytest.raises(QueryError, match="Parquet cannot hold this") as caught:
        write_result(query(tiny_lake, "SELECT INTERVAL 1 DAY AS span"), "parquet", io.BytesIO())
    assert "::VARCHAR" in caught.value.hint
    with pytest.raises(QueryError, match="Parquet is not text"):
        format_result(query(tiny_lake, "SELECT 1"), "parquet")


def ask(lake: Lake, *arguments: str) -> int:
    try:
        main(["sql", lake.url, *arguments])
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


@pytest.mark.parametrize("kind", ["table", "csv", "json", "parquet", "markdown"])
def test_output_is_what_stdout_would_be(
    tiny_lake: Lake, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], kind: str
) -> None:
    asked = ("SELECT row, vec FROM resid WHERE boundary = 0 AND row < 3", "--format", kind)
    assert ask(tiny_lake, *asked) == 0
    printed = capfdbinary.readouterr().out
    assert ask(tiny_lake, *asked, "--output", str(tmp_path / "out")) == 0
    assert (tmp_path / "out").read_bytes() == printed
    assert capfdbinary.readouterr().out == b""
    assert len(printed) > 50


def test_a_query_that_fails_leaves_the_file_as_it_was(tiny_lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    assert ask(tiny_lake, "SELECT lens_top(vec) FROM mlp_post", "--format", "csv", "-o", str(path)) == 2
    assert path.read_text() == "before"
    assert list(tmp_path.glob("*.part")) == []


def test_a_file_of_statements_is_answered_one_by_one(
    tiny_lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.sql"
    path.write_text("SELECT 1 AS a; SELECT 2 AS b;\n")
    assert ask(tiny_lake, "-f", str(path), "--format", "csv") == 0
    assert capsys.readouterr().out == "a\n1\nb\n2\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 3 AS c"))
    assert ask(tiny_lake, "--format", "csv") == 0
    assert capsys.readouterr().out == "c\n3\n"
    assert ask(tiny_lake, "-f", str(path), "-o", str(tmp_path / "out")) == 2
    assert "2 statements" in capsys.readouterr().err


def test_parquet_is_not_for_a_terminal(
    tiny_lake: Lake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert ask(tiny_lake, "SELECT 1", "--format", "parquet") == 2
    assert "--output FILE" in capsys.readouterr().err
