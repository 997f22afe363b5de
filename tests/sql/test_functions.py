"""The functions of a run's schema, against the same numbers from numpy."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from layerlake.catalog.errors import QueryError
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.sql import ReadLog, connect, format_result, query
from layerlake.sql.functions import RUN_FUNCTIONS

MakeRun = Callable[..., Run]
Doubles = npt.NDArray[np.float64]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    """A run whose vocabulary has a text twice, and ids without one."""
    return make_run(vocab=[f"t{i}" if i != 5 else "t4" for i in range(22)])


@pytest.fixture
def lake(run: Run) -> Lake:
    return Lake(run.store.url)


def ask(lake: Lake, text: str) -> list[tuple[Any, ...]]:
    return query(lake, text).fetchall()


def logits_of(run: Run, boundary: int) -> Doubles:
    """The logit lens in float64, token by token: LayerNorm with the vector's own scale, biases included."""
    x = np.concatenate([run.read("resid", boundary, part) for part in run.manifest.partitions]).astype(float)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + run.shape.norm_eps)
    normed = x * run.weight("ln_final.w") + run.weight("ln_final.b")
    logits: Doubles = normed @ run.weight("W_U").astype(float) + run.weight("b_U")
    return logits


def test_units_are_those_of_the_vector(run: Run, lake: Lake) -> None:
    width = run.shape.d_model
    ((first, last, *beyond),) = ask(
        lake,
        f"SELECT unit(vec, 0), unit(vec, {width - 1}), unit(vec, {width}), unit(vec, -1), unit(vec, -2), "  # noqa: S608
        "unit(vec, -(row + 2)), unit(vec, NULL) FROM resid WHERE boundary = 1 AND row = 0",
    )
    assert [first, last] == run.read("resid", 1, run.manifest.partitions[0])[0, [0, -1]].tolist()
    assert beyond == [None] * 5


def test_lens_top_is_the_head_of_the_sorted_logits(run: Run, lake: Lake) -> None:
    logits = logits_of(run, 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = ask(lake, "SELECT lens_top(vec, 5) FROM resid WHERE boundary = 1 ORDER BY row")
    assert len(rows) == len(logits) == 36
    texts = [*run.vocab["text"].to_pylist(), None, None]
    for i, (found,) in enumerate(rows):
        order = np.argsort(-logits[i])[:5]
        assert [each["token_id"] for each in found] == order.tolist()
        assert [each["text"] for each in found] == [texts[token] for token in order]
        np.testing.assert_allclose([each["logit"] for each in found], logits[i, order], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            [each["probability"] for each in found], probabilities[i, order], rtol=1e-4
        )


def test_lens_top_goes_through_the_vocabulary_in_blocks(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "SELECT lens_top(vec, 7) FROM resid ORDER BY boundary, row"
    whole = ask(lake, text)
    monkeypatch.setattr("layerlake.sql.functions._COLUMNS", 5)
    for (in_blocks,), (at_once,) in zip(ask(lake, text), whole, strict=True):
        assert [each["token_id"] for each in in_blocks] == [each["token_id"] for each in at_once]
        np.testing.assert_allclose(
            [each["probability"] for each in in_blocks], [each["probability"] for each in at_once], rtol=1e-5
        )


def test_probabilities_of_the_whole_vocabulary_sum_to_one(lake: Lake) -> None:
    text = "SELECT list_sum([t.probability FOR t IN lens_top(vec, 99)]), len(lens_top(vec, 99)) FROM resid"
    for total, n in ask(lake, text):
        assert total == pytest.approx(1, abs=1e-5)
        assert n == 24


def test_each_row_may_ask_for_another_number(lake: Lake) -> None:
    rows = ask(lake, "SELECT len(lens_top(vec, position + 1)), position FROM resid WHERE boundary = 2")
    assert all(n == position + 1 for n, position in rows)
    assert len({n for n, _ in rows}) > 5


def test_lens_logit_takes_an_id_or_a_text(run: Run, lake: Lake) -> None:
    logits = logits_of(run, 2)
    rows = ask(
        lake,
        "SELECT lens_logit(vec, 3), lens_logit(vec, 't3'), lens_logit(vec, token_id) "
        "FROM resid WHERE boundary = 2 ORDER BY row",
    )
    ids = run.tokens["token_id"].to_numpy()
    expected = np.stack([logits[:, 3], logits[:, 3], logits[np.arange(36), ids]], axis=1)
    np.testing.assert_allclose(np.array(rows), expected, rtol=1e-4, atol=1e-4)


def test_a_vector_without_numbers_has_no_lens(lake: Lake) -> None:
    text = """
        SELECT lens_top(v::FLOAT[8], 2), lens_logit(v::FLOAT[8], 1)
        FROM (VALUES ([1, 2, 3, 4, 5, 6, 7, 'nan'::FLOAT]), ([1, 2, 3, 4, 5, 6, 7, NULL]), (NULL),
                     ([1, 2, 3, 4, 5, 6, 7, 8])) t(v)"""
    rows = ask(lake, text)
    assert [(top is None, logit is None) for top, logit in rows] == [(True, True)] * 3 + [(False, False)]


def test_context_ends_where_its_document_does(run: Run, lake: Lake) -> None:
    tokens = run.tokens.to_pylist()
    texts = [*run.vocab["text"].to_pylist(), "", ""]
    rows = dict(ask(lake, 'SELECT "row", context("row", 2, 3) FROM tokens'))
    for token in tokens:
        around = [each for each in tokens if each["document"] == token["document"]]
        shown = [
            f"«{texts[each['token_id']]}»" if each == token else texts[each["token_id"]]
            for each in around
            if token["position"] - 2 <= each["position"] <= token["position"] + 3
        ]
        assert rows[token["row"]] == "".join(shown)
    assert ask(lake, "SELECT context(10000), context(-1), context(NULL)") == [(None, None, None)]


def test_context_shows_eight_tokens_on_each_side(lake: Lake) -> None:
    rows = ask(
        lake,
        'SELECT context("row") = context("row", 8, 8), context("row") = context("row", 9, 9) FROM tokens',
    )
    assert all(same for same, _ in rows)
    assert not all(longer for _, longer in rows)


def test_top_tokens_is_the_sorted_unit(lake: Lake) -> None:
    found = ask(lake, "FROM top_tokens('mlp_post', 1, 3, 4)")
    expected = "SELECT row, document, position, text, unit(vec, 3) AS value FROM mlp_post WHERE layer = 1"
    assert found == ask(lake, f"{expected} ORDER BY value DESC LIMIT 4")
    assert len(ask(lake, "FROM top_tokens('resid', 2, 3)")) == 10
    columns = [name for name, *_ in ask(lake, "DESCRIBE FROM top_tokens('mlp_post', 1, 3)")]
    assert columns == ["row", "document", "position", "text", "value"]


def test_top_tokens_of_the_rows_of_another_table(lake: Lake) -> None:
    both = ask(
        lake,
        "FROM (VALUES (0), (1)) t(l), top_tokens('mlp_post', l, 3, 2) SELECT l, value ORDER BY l, value DESC",
    )
    each = [
        query(lake, "SELECT $l, value FROM top_tokens('mlp_post', $l, 3, 2)", params={"l": i}) for i in (0, 1)
    ]
    assert both == each[0].fetchall() + each[1].fetchall()


def test_nothing_is_read_to_plan_a_query(lake: Lake) -> None:
    log = ReadLog()
    relation = query(lake, "FROM top_tokens('mlp_post', 1, 3)", log=log)
    assert log.n_chunks == 0
    relation.fetchall()
    assert log.layers("mlp_post") == {1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT lens_top(vec) FROM mlp_post", "vectors of 8; this one has 16"),
        ("SELECT lens_top(vec, 0) FROM resid", "k is at least 1"),
        ("SELECT lens_logit(vec, 24) FROM resid", "no token 24. Ids are 0 … 23"),
        ("SELECT lens_logit(vec, -1) FROM resid", "no token -1"),
        (
            "SELECT lens_logit(vec, 'x') FROM resid",
            "No tokens of the vocabulary are written 'x'.*begin with a space",
        ),
        ("SELECT lens_logit(vec, 't4') FROM resid", r"2 tokens of the vocabulary are written 't4' \(4, 5\)"),
        ("SELECT context(1, -1)", "no context of -1"),
        ("FROM top_tokens('mlp_post', 1, 16)", "no unit 16. Units are 0 … 15"),
        ("FROM top_tokens('mlp_pst', 1, 1)", "no vectors of 'mlp_pst'.*mlp_post"),
    ],
)
def test_mistakes_are_told_without_a_traceback(lake: Lake, text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message) as caught:
        format_result(query(lake, text))
    assert "Python exception" not in str(caught.value)


def test_functions_of_several_runs_are_in_their_schemas(run: Run, make_run: MakeRun) -> None:
    other = make_run(name="other", seed=1)
    lake = Lake(run.store.url)
    for text in (
        "SELECT lens_top([1]::FLOAT[1])",
        "FROM top_tokens('mlp_post', 0, 0)",
        "SELECT project([1], 'a')",
    ):
        with pytest.raises(QueryError, match="does not exist") as caught:
            query(lake, text)
        assert "--run" in caught.value.hint
        assert other.run_id in caught.value.hint
    for each in (run, other):
        expected = logits_of(each, 2)[:, 3]
        qualified = 'SELECT "ID".lens_logit(vec, 3) FROM "ID".resid WHERE boundary = 2 ORDER BY row'
        np.testing.assert_allclose(
            [row[0] for row in ask(lake, qualified.replace("ID", each.run_id))],
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
        bare = query(
            lake, "SELECT lens_logit(vec, 3) FROM resid WHERE boundary = 2 ORDER BY row", run=each.run_id
        )
        np.testing.assert_allclose([row[0] for row in bare.fetchall()], expected, rtol=1e-4, atol=1e-4)


def test_other_missing_functions_get_no_list_of_relations(lake: Lake) -> None:
    with pytest.raises(QueryError, match="nosuch does not exist") as caught:
        query(lake, "SELECT nosuch(1)")
    assert caught.value.hint == ""


def test_a_connection_has_the_functions_and_lets_go_of_them(run: Run) -> None:
    lake = Lake(run.store.url)
    connection = connect(lake)
    known = {
        name for (name,) in connection.execute("SELECT function_name FROM duckdb_functions()").fetchall()
    }
    assert known.issuperset(RUN_FUNCTIONS)
    assert connection.execute("SELECT count(lens_top(vec)) FROM resid").fetchall() == [(36 * 3,)]
    of_lake = weakref.ref(lake.store)
    del lake, connection
    gc.collect()
    assert of_lake() is None


def test_a_connection_that_is_open_when_python_ends_is_quiet(run: Run) -> None:
    code = (
        "import sys, layerlake; connection = layerlake.open_lake(sys.argv[1]).connect(); "
        "relation = connection.sql('SELECT lens_top(vec) FROM resid')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run.store.url], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
