"""``--max-memory`` is shared out so that it suffices, or refused with what would."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.capture.known_models import KNOWN_MODELS
from layerlake.capture.memory import MemoryPlan, PeakMemory, plan_memory, row_nbytes, values_nbytes
from layerlake.capture.placement import batch_documents
from layerlake.catalog.errors import PlanError
from layerlake.catalog.layout import n_pairs, plan_geometry
from layerlake.catalog.manifest import Partition
from layerlake.catalog.sites import SITES

GPT2 = KNOWN_MODELS["gpt2"]
GEOMETRY = plan_geometry(GPT2, context=512, dtype="float16", max_memory=4 << 30)
EVERYTHING = tuple(SITES)
FULL = (Partition(0, 8192, 8192 * 513 // 2, 16),)
"""One partition full of windows."""


def share_out(**options: Any) -> MemoryPlan:
    asked: dict[str, Any] = {
        "sites": EVERYTHING, "dtype": "float16", "compute_dtype": "float32", "batch_tokens": 4096,
        "max_memory": "4GiB", "n_tokens": 100_000, "n_documents": 200, "on_host": True, "is_local": True,
        "partitions": FULL,
    }  # fmt: skip
    return plan_memory(GPT2, GEOMETRY, **asked | options)


def test_a_site_s_values_are_counted_by_its_rows() -> None:
    counted = {
        site: values_nbytes(GPT2, [site], "float16", n_tokens=10, pairs=30, n_documents=2) for site in SITES
    }
    assert counted == {
        "resid": 13 * 10 * 768 * 2,
        "attn_out": 12 * 10 * 768 * 2,
        "mlp_out": 12 * 10 * 768 * 2,
        "mlp_post": 12 * 10 * 3072 * 2,
        "pattern": 12 * 12 * 30 * 2,
        "attn_band": 12 * 12 * 2 * 2 * 18 * 4,
    }
    together = values_nbytes(GPT2, SITES, "float16", n_tokens=10, pairs=30, n_documents=2)
    assert together == sum(counted.values())


@given(
    st.integers(30, 40).map(lambda power: 1 << power),
    st.sampled_from([1, 512, 4096, 65536]),
    st.booleans(),
    st.booleans(),
    st.sets(st.sampled_from(EVERYTHING), min_size=1),
)
def test_what_is_shared_out_adds_up(
    max_memory: int, batch_tokens: int, on_host: bool, is_local: bool, sites: set[str]
) -> None:
    options = {"on_host": on_host, "is_local": is_local, "sites": tuple(sites), "batch_tokens": batch_tokens}
    try:
        plan = share_out(max_memory=max_memory, **options)
    except PlanError:
        assert max_memory < 8 << 30
        return
    assert plan.partition_nbytes <= plan.budget_nbytes
    assert 0 < plan.peak_nbytes <= max_memory
    assert 1 <= plan.batch_tokens <= max(batch_tokens, 512)
    assert plan.write_threads >= 1
    assert (plan.forward_nbytes == 0) == (not on_host)
    assert (plan.slot_nbytes == 0) == on_host


def test_with_less_memory_batches_are_smaller_and_encoders_fewer() -> None:
    ample, scarce = share_out(max_memory="16GiB"), share_out(max_memory="1900MiB")
    assert (ample.batch_tokens, ample.write_threads) == (4096, 2)
    assert scarce.batch_tokens < 4096
    assert scarce.peak_nbytes <= 1900 << 20


def test_what_would_suffice_is_said_and_does() -> None:
    with pytest.raises(PlanError, match=r"more than --max-memory 1\.0 GiB") as caught:
        share_out(max_memory="1GiB")
    enough = caught.value.hint.split("--max-memory ")[1].split(" or")[0]
    plan = share_out(max_memory=enough)
    assert (plan.write_threads, plan.batch_tokens) == (1, 512)


def test_many_short_documents_take_more_of_what_is_by_document() -> None:
    """A partition of 2000 documents of four tokens: their band sums are a hundred times those of 16 windows."""
    short = (Partition(0, 8000, 2000 * n_pairs(4), 2000),)
    plan = share_out(partitions=short, sites=("attn_band",))
    taken = values_nbytes(GPT2, ["attn_band"], "float16", n_tokens=8000, pairs=20_000, n_documents=2000)
    assert taken <= plan.partition_nbytes <= plan.budget_nbytes
    assert plan.writing_nbytes >= 2 * taken  # the table of one partition, in the making


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=16),
    st.sampled_from([512, 1000, 4096]),
    st.sets(st.sampled_from(EVERYTHING), min_size=1),
)
def test_a_pinned_slot_holds_any_batch(lengths: list[int], batch_tokens: int, sites: set[str]) -> None:
    """Documents of unequal length too, which are padded to the longest."""
    plan = share_out(on_host=False, batch_tokens=batch_tokens, sites=tuple(sites), max_memory="64GiB")
    for batch in batch_documents(range(len(lengths)), lengths, plan.batch_tokens):
        held = [lengths[i] for i in batch]
        for site in sites:
            rows = {"token": sum(held), "pair": sum(map(n_pairs, held)), "document": len(held)}
            assert row_nbytes(GPT2, site, "float16") * rows[SITES[site].rows] <= plan.slot_nbytes
    assert plan.slot_nbytes.bit_count() == 1


def test_a_remote_store_is_given_more_threads() -> None:
    local, remote = share_out(max_memory="64GiB"), share_out(max_memory="64GiB", is_local=False)
    assert remote.write_threads > local.write_threads
    assert remote.writing_nbytes > local.writing_nbytes


def test_the_peak_of_a_block_is_measured() -> None:
    with PeakMemory() as peak, mmap.mmap(-1, 64 << 20) as memory:
        memory.write(b"x" * (64 << 20))
    if peak.nbytes is None:
        pytest.skip("this system does not tell how much memory a process has taken")
    assert 60 << 20 < peak.nbytes < 200 << 20
