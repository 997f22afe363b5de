"""What a plan says it will cost is what then lies there, and what the paper's models are known to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from layerlake.capture.cost import forward_flops, site_costs
from layerlake.capture.execute import execute_plan
from layerlake.capture.known_models import KNOWN_MODELS
from layerlake.capture.plan import CapturePlan, plan_capture
from layerlake.capture.spec import CaptureSpec
from layerlake.catalog import layout
from layerlake.catalog.layout import object_name
from layerlake.catalog.sites import SITES
from layerlake.catalog.stores import Store

MakeSpec = Callable[..., CaptureSpec]

# bytes a token at fp16 and 512 tokens: the residual stream, what a sublayer adds, neurons, the causal triangle
NBYTES_PER_TOKEN = {
    "EleutherAI/pythia-410m-deduped": (51_200, 49_152, 196_608, 196_992),
    "EleutherAI/pythia-1.4b-deduped": (102_400, 98_304, 393_216, 196_992),
    "EleutherAI/pythia-2.8b-deduped": (168_960, 163_840, 655_360, 525_312),
    "EleutherAI/pythia-6.9b-deduped": (270_336, 262_144, 1_048_576, 525_312),
    "openai-community/gpt2": (19_968, 18_432, 73_728, 73_872),
    "openai-community/gpt2-medium": (51_200, 49_152, 196_608, 196_992),
    "openai-community/gpt2-large": (94_720, 92_160, 368_640, 369_360),
    "openai-community/gpt2-xl": (156_800, 153_600, 614_400, 615_600),
    "microsoft/phi-1": (102_400, 98_304, 393_216, 393_984),
    "microsoft/phi-1_5": (102_400, 98_304, 393_216, 393_984),
    "microsoft/phi-2": (168_960, 163_840, 655_360, 525_312),
    "Qwen/Qwen2.5-0.5B": (44_800, 43_008, 233_472, 172_368),
    "Qwen/Qwen2.5-1.5B": (89_088, 86_016, 501_760, 172_368),
    "Qwen/Qwen2.5-3B": (151_552, 147_456, 792_576, 295_488),
    "meta-llama/Llama-3.2-1B": (69_632, 65_536, 262_144, 262_656),
    "meta-llama/Llama-3.2-3B": (178_176, 172_032, 458_752, 344_736),
}

# GFLOP a token of 512: one block, and the unembedding, which a capture leaves out, with the whole forward
GFLOP_PER_TOKEN = {
    "EleutherAI/pythia-410m-deduped": (0.0262, 0.1030, 0.732),
    "EleutherAI/pythia-1.4b-deduped": (0.1028, 0.2060, 2.672),
    "EleutherAI/pythia-2.8b-deduped": (0.1599, 0.2576, 5.375),
    "EleutherAI/pythia-6.9b-deduped": (0.4069, 0.4131, 13.433),
    "openai-community/gpt2": (0.0149, 0.0772, 0.257),
    "openai-community/gpt2-medium": (0.0262, 0.1029, 0.732),
    "openai-community/gpt2-large": (0.0406, 0.1287, 1.592),
    "openai-community/gpt2-xl": (0.0631, 0.1608, 3.189),
    "microsoft/phi-1": (0.1028, 0.2097, 2.676),
    "microsoft/phi-1_5": (0.1028, 0.2097, 2.676),
    "microsoft/phi-2": (0.1599, 0.2621, 5.379),
    "Qwen/Qwen2.5-0.5B": (0.0307, 0.2723, 1.010),
    "Qwen/Qwen2.5-1.5B": (0.0952, 0.4667, 3.131),
    "Qwen/Qwen2.5-3B": (0.1562, 0.6223, 6.247),
    "meta-llama/Llama-3.2-1B": (0.1237, 0.5253, 2.505),
    "meta-llama/Llama-3.2-3B": (0.2045, 0.7880, 6.513),
}


@pytest.mark.parametrize("model", NBYTES_PER_TOKEN)
def test_the_models_of_the_paper_take_what_they_are_known_to_take(model: str) -> None:
    """Full windows, so that nothing but checksums and indices comes on top: less than 1 %."""
    plan = plan_capture(CaptureSpec(model=model, max_tokens="1M", max_memory="512GiB"))
    n_tokens = plan.tokens.num_rows
    assert n_tokens == 1953 * 512
    resid, sublayer, mlp_post, pattern = NBYTES_PER_TOKEN[model]
    known = {
        "resid": resid, "attn_out": sublayer, "mlp_out": sublayer, "mlp_post": mlp_post, "pattern": pattern,
    }  # fmt: skip
    for cost in plan.costs:
        if cost.site == "attn_band":
            n_heads = plan.manifest.shape.n_layers * plan.manifest.shape.n_heads
            assert cost.nbytes == 1953 * n_heads * 2 * 18 * 4  # 72 floats and BOS, for two sets of queries
        else:
            assert (
                known.pop(cost.site) * n_tokens
                <= cost.nbytes
                <= 1.01 * known_total(cost.site, model, n_tokens)
            )
    assert not known


def known_total(site: str, model: str, n_tokens: int) -> int:
    """The bytes of a site, checksums and indices apart."""
    resid, sublayer, mlp_post, pattern = NBYTES_PER_TOKEN[model]
    by_site = {"resid": resid, "mlp_post": mlp_post, "pattern": pattern}
    return by_site.get(site, sublayer) * n_tokens


@pytest.mark.parametrize("model", GFLOP_PER_TOKEN)
def test_a_forward_takes_the_operations_that_it_is_known_to_take(model: str) -> None:
    shape = KNOWN_MODELS[model]
    _, unembed, whole = GFLOP_PER_TOKEN[model]
    gflop = forward_flops(shape, [512]) / 512 / 1e9
    assert gflop == pytest.approx(whole - unembed, abs=1e-3)
    assert gflop / shape.n_layers == pytest.approx(GFLOP_PER_TOKEN[model][0], abs=6e-5)


def test_gpt_2_is_known_by_its_old_name_too() -> None:
    assert KNOWN_MODELS["gpt2-xl"] is KNOWN_MODELS["openai-community/gpt2-xl"]
    assert len(set(map(id, KNOWN_MODELS.values()))) == len(NBYTES_PER_TOKEN)


def nbytes_on_disk(lake: Path, plan: CapturePlan, site: str) -> list[int]:
    """The bytes of each object of a site."""
    run = lake / "runs" / plan.run_id
    first = run / object_name(SITES[site], 0, 0)
    folder = first.parents[2] if SITES[site].is_array else first.parent
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


class CountingStore(Store):
    """Counts what is put into it."""

    puts: ClassVar[Counter[str]] = Counter()

    def _put(self, name: str, *pieces: bytes | memoryview, create: bool) -> None:
        super()._put(name, *pieces, create=create)
        type(self).puts[name] += 1


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("gpt_neo", {"dtype": "float16", "max_tokens": 150}),
        ("phi", {"dtype": "bfloat16", "partition_tokens": 8192}),
        ("llama", {"partition_tokens": None, "max_memory": "1GiB", "chunk_nbytes": 1 << 12}),
    ],
    ids=["small partitions", "few tokens", "one large partition", "many chunks"],
)
def test_bytes_objects_and_requests_are_what_the_plan_says(
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(layout, "CHUNK_NBYTES", options.pop("chunk_nbytes", layout.CHUNK_NBYTES))
    monkeypatch.setattr(CountingStore, "puts", Counter())
    monkeypatch.setattr("layerlake.capture.execute.Store", CountingStore)
    monkeypatch.setattr("layerlake.catalog.lake.Store", CountingStore)
    lake = tmp_path / "lake"
    spec = make_spec(family, **options)
    plan = plan_capture(spec, lake)
    first = execute_plan(plan, lake).run
    assert first is not None
    assert CountingStore.puts.total() == plan.n_requests
    for cost in plan.costs:
        found = nbytes_on_disk(lake, plan, cost.site)
        assert len(found) == cost.n_objects
        if SITES[cost.site].is_array:
            assert sum(found) == cost.nbytes
            array = first.array(cost.site)
            assert (array.shape, array.chunks, array.shards) == (cost.shape, cost.chunks, cost.shards)
            assert str(array.dtype) == cost.dtype
    assert plan.nbytes == sum(cost.nbytes for cost in plan.costs)


def test_an_extension_costs_what_it_adds(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = tmp_path / "lake"
    for options in ({"sites": "resid", "max_tokens": 150}, {"sites": "resid,attn_band"}):
        monkeypatch.setattr(CountingStore, "puts", Counter())
        monkeypatch.setattr("layerlake.capture.execute.Store", CountingStore)
        monkeypatch.setattr("layerlake.catalog.lake.Store", CountingStore)
        plan = plan_capture(make_spec(**options), lake)
        before = sum(nbytes_on_disk(lake, plan, "resid"))
        execute_plan(plan, lake)
        assert CountingStore.puts.total() == plan.n_requests
        (resid,) = (cost for cost in plan.costs if cost.site == "resid")
        assert sum(nbytes_on_disk(lake, plan, "resid")) - before == resid.nbytes


def test_the_band_takes_about_as_much_as_is_said(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Its size is that of its numbers; Parquet adds some 4 kB an object, and compresses."""
    plan = plan_capture(make_spec(sites="attn_band", partition_tokens=8192), tmp_path / "lake")
    execute_plan(plan, tmp_path / "lake")
    (found,) = nbytes_on_disk(tmp_path / "lake", plan, "attn_band")
    assert 0.5 * plan.nbytes < found < plan.nbytes + 8192


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_sites_take_no_more_than_is_said(make_spec: MakeSpec, tmp_path: Path, codec: str) -> None:
    plan = plan_capture(make_spec(codec=codec, dtype="float16"), tmp_path / "lake")
    execute_plan(plan, tmp_path / "lake")
    for cost in plan.costs:
        if SITES[cost.site].is_array:
            found = sum(nbytes_on_disk(tmp_path / "lake", plan, cost.site))
            assert 0.3 * cost.nbytes < found <= cost.nbytes + 16 * cost.n_objects * 100


def test_every_site_is_priced(make_spec: MakeSpec) -> None:
    plan = plan_capture(make_spec())
    assert plan.frozen is not None
    assert [cost.site for cost in site_costs(plan.manifest, plan.frozen.work)] == list(SITES)
