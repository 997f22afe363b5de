"""A capture on a store that fails, and one on S3: nothing is lost, and nothing differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from layerlake import CaptureSpec, Run, capture_run, open_lake
from layerlake.catalog.stores import Store

MakeSpec = Callable[..., CaptureSpec]


def contents(url: str) -> dict[str, bytes]:
    """Every object that captures write; the log's without the times that it tells."""
    store = Store(url)
    found = {name: store.read(name) for name, _ in store.walk() if not name.startswith("findings/")}
    return {name: _timeless(content) if "/log/" in name else content for name, content in found.items()}


def _timeless(content: bytes) -> bytes:
    manifest = json.loads(content)
    del manifest["checksum"]
    for capture in manifest["captures"]:
        del capture["finished"]
    return json.dumps(manifest).encode()


def values(run: Run) -> dict[str, Any]:
    return {site: getattr(run, site) for site in run.sites}


def assert_same_values(one: Run, other: Run) -> None:
    assert one.sites == other.sites
    for site, found in values(one).items():
        if site == "attn_band":
            assert found == other.attn_band
        else:
            np.testing.assert_array_equal(found.to_numpy(), getattr(other, site).to_numpy(), err_msg=site)


@pytest.fixture(scope="module")
def healthy(make_spec: MakeSpec) -> str:
    """The same two captures in memory: some sites of some documents, then everything."""
    url = f"memory://{uuid4().hex}/lake"
    capture_run(url, make_spec(sites="resid", max_tokens=100))
    capture_run(url, make_spec())
    return url


def test_a_store_that_fails_every_tenth_call_loses_nothing(
    make_spec: MakeSpec, healthy: str, flaky: type[Any]
) -> None:
    url = "flaky://lake"
    capture_run(url, make_spec(sites="resid", max_tokens=100))
    run = capture_run(url, make_spec())
    assert flaky.failures["pipe_file"] > 5
    assert flaky.failures["cat_file"] > 0
    flaky.failures.clear()
    assert_same_values(run, open_lake(healthy).run())
    assert flaky.failures["cat_file"] > 5
    assert contents(url) == contents(healthy)


def test_what_is_read_from_a_failing_store_is_right(
    make_spec: MakeSpec, healthy: str, flaky: type[Any]
) -> None:
    capture_run("flaky://lake", make_spec())
    lake, other = open_lake("flaky://lake"), open_lake(healthy)
    query = """
        SELECT layer, count(*) AS n, sum(list_sum(vec)) AS total FROM mlp_out WHERE position > 2 GROUP BY layer
        ORDER BY layer
    """
    flaky.failures.clear()
    assert lake.sql(query).fetchall() == other.sql(query).fetchall()
    lake.analyze("norms")
    other.analyze("norms")
    assert lake.sql("FROM norms ORDER BY ALL").fetchall() == other.sql("FROM norms ORDER BY ALL").fetchall()
    assert flaky.failures["cat_file"] > 0


def test_a_capture_on_s3_is_read_queried_and_extended(make_spec: MakeSpec, healthy: str, s3_url: str) -> None:
    url = f"{s3_url}/some/lake"
    first = capture_run(url, make_spec(sites="resid", max_tokens=100))
    assert open_lake(url).run().n_tokens == first.n_tokens <= 100
    count = "SELECT count(*), count(DISTINCT boundary) FROM resid WHERE document < 3 AND vec[1] IS NOT NULL"
    before = open_lake(url).sql(count).fetchall()
    run = capture_run(url, make_spec())
    assert run.manifest.number == 2
    assert open_lake(url).sql(count).fetchall() == before
    np.testing.assert_array_equal(first.resid.to_numpy(), run.resid.to_numpy()[:, : first.n_tokens])
    assert_same_values(run, open_lake(healthy).run())
    assert contents(url) == contents(healthy)
