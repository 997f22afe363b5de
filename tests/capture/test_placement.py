"""Every document gets its own rows and pairs inside one partition, and a place in one batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture.placement import EncodedDocument, batch_documents, place_documents
from layerlake.catalog.layout import Geometry, n_pairs

CONTEXT = 10


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[EncodedDocument], Geometry]:
    lengths = draw(st.lists(st.integers(0, CONTEXT), max_size=40))  # 0: refused
    rows = draw(st.integers(CONTEXT // 2, 30)) * 2
    documents = []
    for i, n in enumerate(lengths):
        extra = draw(st.integers(0, 5)) if n == CONTEXT else 0
        ids = np.arange(1000 * i, 1000 * i + n, dtype=np.int32)
        documents.append(EncodedDocument((f"d#{i}",), ids, n + extra, None if n else "too short"))
    return documents, Geometry(rows, CONTEXT, {})


@given(inputs(), st.integers(0, 5), st.integers(0, 7))
def test_nothing_is_lost_and_nothing_overlaps(
    given_: tuple[list[EncodedDocument], Geometry], first_document: int, first_partition: int
) -> None:
    encoded, geometry = given_
    placed = place_documents(
        encoded, geometry, first_document=first_document, first_partition=first_partition
    )
    rows = placed.documents.to_pylist()
    assert [row["document"] for row in rows] == list(range(first_document, first_document + len(encoded)))
    assert [row["sources"] for row in rows] == [list(item.sources) for item in encoded]

    used_rows: set[int] = set()
    used_pairs: set[int] = set()
    sums: dict[int, list[int]] = {}
    for row, item in zip(rows, encoded, strict=True):
        n = len(item.token_ids)
        if item.refusal is not None:
            assert (row["status"], row["reason"], row["n_tokens"]) == ("refused", "too short", 0)
            assert row["partition"] is row["row_start"] is row["pair_start"] is None
            continue
        assert row["status"] == ("cut" if item.n_source_tokens > n else "stored")
        assert (row["reason"] is None) == (row["status"] == "stored")
        assert row["n_tokens"] == n
        own_rows = set(range(row["row_start"], row["row_start"] + n))
        own_pairs = set(range(row["pair_start"], row["pair_start"] + n_pairs(n)))
        assert not own_rows & used_rows
        assert not own_pairs & used_pairs
        used_rows |= own_rows
        used_pairs |= own_pairs
        assert {r // geometry.partition_tokens for r in own_rows} == {row["partition"]}
        assert {p // geometry.partition_pairs for p in own_pairs} == {row["partition"]}
        total = sums.setdefault(row["partition"], [0, 0, 0])
        total[:] = total[0] + n, total[1] + n_pairs(n), total[2] + 1

    assert [p.index for p in placed.partitions] == list(
        range(first_partition, first_partition + len(placed.partitions))
    )
    assert {p.index: [p.n_rows, p.n_pairs, p.n_documents] for p in placed.partitions} == sums
    for partition in placed.partitions:  # from the first row on, without gaps
        start = partition.index * geometry.partition_tokens
        assert set(range(start, start + partition.n_rows)) <= used_rows

    tokens = placed.tokens
    stored = [item for item in encoded if item.refusal is None]
    expected = np.concatenate([item.token_ids for item in stored]) if stored else np.zeros(0)
    np.testing.assert_array_equal(tokens["token_id"].to_numpy(), expected)
    assert set(tokens["row"].to_pylist()) == used_rows
    starts = {row["document"]: row["row_start"] for row in rows}
    for token in tokens.to_pylist():
        assert token["row"] == starts[token["document"]] + token["position"]


@given(inputs(), st.integers(0, 40))
def test_documents_added_later_take_the_places_after(
    given_: tuple[list[EncodedDocument], Geometry], cut: int
) -> None:
    encoded, geometry = given_
    first = place_documents(encoded[:cut], geometry)
    later = place_documents(
        encoded[cut:],
        geometry,
        first_document=len(encoded[:cut]),
        first_partition=len(first.partitions),
    )
    rows = first.tokens["row"].to_pylist() + later.tokens["row"].to_pylist()
    assert len(set(rows)) == len(rows)
    assert sum(p.n_documents for p in first.partitions + later.partitions) == sum(
        item.refusal is None for item in encoded
    )


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 60))
def test_batches_keep_to_the_budget_and_lose_nothing(lengths: list[int], budget: int) -> None:
    documents = [100 + 3 * i for i in range(len(lengths))]
    length = dict(zip(documents, lengths, strict=True))
    batches = batch_documents(documents, lengths, budget)
    assert sorted(document for batch in batches for document in batch) == documents
    for batch in batches:
        padded = len(batch) * max(length[document] for document in batch)
        assert padded <= budget or len(batch) == 1
    flat = [length[document] for batch in batches for document in batch]
    assert flat == sorted(flat, reverse=True)  # like beside like, and the most memory is needed first


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.randoms())
def test_batches_do_not_depend_on_the_order_given(lengths: list[int], random: object) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert batch_documents(order, [lengths[i] for i in order], 30) == batch_documents(
        range(len(lengths)), lengths, 30
    )
