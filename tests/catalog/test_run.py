"""A run opened for reading: labelled arrays that equal what was put in, and nothing read before it is asked for."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import dask
import numpy as np
import pyarrow.compute as pc
import pytest
from zarr.storage import LocalStore

from layerlake.catalog.errors import CorruptRun, SiteNotFound
from layerlake.catalog.lake import Lake
from layerlake.catalog.manifest import Manifest
from layerlake.catalog.run import Run
from layerlake.catalog.shapes import ModelShape
from layerlake.catalog.shards import decode

Array = np.ndarray[Any, np.dtype[Any]]

SHAPE = ModelShape(
    family="gpt2", n_layers=3, d_model=8, n_heads=2, n_kv_heads=2, d_head=4, d_mlp=12, n_vocab=24, n_ctx=32,
    block="sequential", norm="layernorm", norm_eps=1e-5, act_fn="gelu_new", gated_mlp=False, tied_unembed=False,
)  # fmt: skip
LENGTHS = (5, 9, 3, 12, 1, 7, 2, 12)
N_TOKENS = sum(LENGTHS)
N_PAIRS = sum(n * (n + 1) // 2 for n in LENGTHS)


@pytest.fixture
def values() -> dict[str, Array]:
    """Values of every site, numbered so that no two are alike."""
    sizes = {
        "resid": (4, N_TOKENS, 8),
        "attn_out": (3, N_TOKENS, 8),
        "mlp_out": (3, N_TOKENS, 8),
        "mlp_post": (3, N_TOKENS, 12),
        "pattern": (3, 2, N_PAIRS),
    }
    return {
        site: np.random.default_rng(i).permutation(np.prod(size)).reshape(size).astype(np.float32) + 1
        for i, (site, size) in enumerate(sizes.items())
    }


@pytest.fixture
def run(make_run: Callable[..., Run], values: dict[str, Array]) -> Run:
    return make_run(shape=SHAPE, lengths=LENGTHS, values=values)


def bfloat16(values: Array) -> Array:
    """The float32 that a bfloat16 by truncation stands for."""
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    floats: Array = bits.view(np.float32)
    return floats


STORED: dict[str, Callable[[Array], Array]] = {
    "float32": lambda values: values,
    "float16": lambda values: values.astype(np.float16),
    "bfloat16": bfloat16,
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("url", [None, "memory://test-run/lake"])
def test_sites_equal_what_was_put_in(
    make_run: Callable[..., Run], values: dict[str, Array], dtype: str, url: str | None
) -> None:
    run = make_run(url, shape=SHAPE, lengths=LENGTHS, values=values, dtype=dtype)
    assert len(run.manifest.partitions) > 2
    for site, expected in values.items():
        found = getattr(run, site)
        np.testing.assert_array_equal(found.to_numpy(), STORED[dtype](expected), err_msg=site)
        assert found.dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_array_equal(run.resid_pre.to_numpy(), STORED[dtype](values["resid"][:-1]))
    np.testing.assert_array_equal(run.resid_post.to_numpy(), STORED[dtype](values["resid"][1:]))
    middle = STORED[dtype](values["resid"][:-1]).astype(np.float32) + STORED[dtype](values["attn_out"])
    np.testing.assert_array_equal(run.resid_mid.to_numpy(), middle)
    run.store.delete("")


def test_arrays_are_labelled(run: Run) -> None:
    resid = run.resid
    assert resid.dims == ("boundary", "token", "d_model")
    assert resid["boundary"].to_numpy().tolist() == [0, 1, 2, 3]
    post = run.resid_post
    assert (post.name, post.dims) == ("resid_post", ("layer", "token", "d_model"))
    assert post["layer"].to_numpy().tolist() == [0, 1, 2]
    assert run.pattern.dims == ("layer", "head", "pair")
    for label in ("row", "document", "position", "token_id"):
        np.testing.assert_array_equal(resid[label].to_numpy(), run.tokens[label].to_numpy())
    chosen = resid.isel(boundary=2, token=(resid["document"] == 3).to_numpy())
    assert chosen.sizes["token"] == 12
    assert chosen["position"].to_numpy().tolist() == list(range(12))


def test_rows_are_places_on_the_token_axis(run: Run, values: dict[str, Array]) -> None:
    """``row`` counts the unwritten rows between partitions too."""
    rows = run.tokens["row"].to_numpy()
    assert rows.max() >= N_TOKENS
    np.testing.assert_array_equal(np.asarray(run.array("resid")[1])[rows], values["resid"][1])
    for partition in run.manifest.partitions:
        inside = rows // run.manifest.geometry.partition_tokens == partition.index
        assert inside.sum() == partition.n_rows
        np.testing.assert_array_equal(run.read("resid", 1, partition), values["resid"][1][inside])
    read = np.concatenate([run.read("pattern", 2, p) for p in run.manifest.partitions], axis=1)
    np.testing.assert_array_equal(read, values["pattern"][2])


@pytest.mark.parametrize("dtype", STORED)
def test_attention_unpacks_a_document(
    make_run: Callable[..., Run], values: dict[str, Array], dtype: str
) -> None:
    run = make_run(shape=SHAPE, lengths=LENGTHS, values=values, dtype=dtype)
    start = 0
    for document, n in enumerate(LENGTHS):
        found = run.attention(document, 1)
        assert found.dims == ("head", "query", "key")
        assert found.dtype == np.float32
        expected, pair = np.zeros((2, n, n), np.float32), start
        for query in range(n):
            for key in range(query + 1):
                expected[:, query, key] = STORED[dtype](values["pattern"][1, :, pair])
                pair += 1
        np.testing.assert_array_equal(found.to_numpy(), expected)
        start = pair
    with pytest.raises(SiteNotFound, match="no document 99"):
        run.attention(99, 0)


def test_bands_are_sums_of_the_patterns_of_all_partitions(run: Run) -> None:
    table = run.attn_band
    assert table.num_rows == len(LENGTHS) * 3 * 2 * 2
    for row in table.to_pylist():
        pattern = run.attention(row["document"], row["layer"]).to_numpy()[row["head"]].astype(np.float64)
        first = 0 if row["queries"] == "all" else 17
        diagonals = [np.diagonal(pattern, -k)[max(0, first - k) :] for k in range(17)]
        assert row["distance_sums"] == pytest.approx([each.sum() for each in diagonals], rel=1e-6)
        assert row["distance_counts"] == [len(each) for each in diagonals]
        assert row["bos_sum"] == pytest.approx(pattern[max(first, 1) :, 0].sum(), rel=1e-6)
    by_partition = [run.read_attn_band(partition) for partition in run.manifest.partitions]
    assert [set(part["document"].to_pylist()) for part in by_partition] == [
        {d["document"] for d in run.documents.to_pylist() if d["partition"] == partition.index}
        for partition in run.manifest.partitions
    ]


def test_some_columns_and_rows_of_the_bands(run: Run) -> None:
    partition = run.manifest.partitions[1]
    where = (pc.field("layer") == 2) & (pc.field("queries") == "late")
    found = run.read_attn_band(partition, columns=["bos_count", "document"], where=where)
    everything = run.read_attn_band(partition).to_pylist()
    assert found.to_pylist() == [
        {"bos_count": row["bos_count"], "document": row["document"]}
        for row in everything
        if row["layer"] == 2 and row["queries"] == "late"
    ]


def test_bands_are_a_site_but_no_array(make_run: Callable[..., Run], run: Run) -> None:
    assert run.has_site("attn_band")
    assert run.extent("attn_band") == run.extent("resid")
    with pytest.raises(SiteNotFound, match="'attn_band' is a table") as caught:
        run.array("attn_band")
    assert "run.attn_band" in caught.value.hint
    alone = make_run(sites=("attn_band",), name="alone")
    assert alone.sites == ("attn_band",)
    objects = alone.objects.to_pylist()
    assert [(row["name"], row["layer"]) for row in objects] == [
        (f"attn_band/part-{partition.index:08d}.parquet", None) for partition in alone.manifest.partitions
    ]
    without = Run(run.store, replace(run.manifest, sites={"resid": run.manifest.sites["resid"]}))
    with pytest.raises(SiteNotFound, match="holds site 'attn_band' not at all"):
        without.attn_band  # noqa: B018


def test_masked_tokens_are_positions_1_to_n_minus_2_with_their_next_token(run: Run) -> None:
    tokens = run.tokens.to_pylist()
    expected = [
        here | {"next_token_id": following["token_id"]}
        for here, following in pairwise(tokens)
        if here["document"] == following["document"] and here["position"] > 0
    ]
    assert run.masked_tokens.to_pylist() == expected
    assert len(expected) == sum(max(0, n - 2) for n in LENGTHS)


def test_parallel_blocks_have_no_middle(make_run: Callable[..., Run]) -> None:
    run = make_run(shape=replace(SHAPE, family="gpt_neox", block="parallel"))
    with pytest.raises(SiteNotFound, match="parallel blocks of gpt_neox"):
        run.resid_mid  # noqa: B018
    assert run.resid_post.shape[0] == 3


def test_a_site_that_was_not_captured_says_how_to_capture_it(make_run: Callable[..., Run]) -> None:
    run = make_run(sites=("resid",))
    assert run.sites == ("resid",)
    for read in (lambda: run.mlp_post, lambda: run.array("mlp_post"), lambda: run.extent("mlp_post")):
        with pytest.raises(SiteNotFound, match="holds resid") as caught:
            read()
        assert "--sites mlp_post" in caught.value.hint
    with pytest.raises(SiteNotFound, match="attn_out"):
        run.resid_mid  # noqa: B018
    with pytest.raises(SiteNotFound, match="Did you mean 'resid'") as unknown:
        run.require_sites("residd")
    assert unknown.value.hint == ""


def test_a_site_held_in_part_is_not_given_as_if_whole(run: Run) -> None:
    manifest = replace(run.manifest, sites=run.manifest.sites | {"mlp_post": (0,)})
    part = Run(run.store, manifest)
    assert "mlp_post" in part.sites
    with pytest.raises(SiteNotFound, match=rf"in 1 of its {len(manifest.partitions)} partitions only"):
        part.mlp_post  # noqa: B018


def test_an_extent_names_tokens_and_partitions(run: Run) -> None:
    indices = [p.index for p in run.manifest.partitions]
    assert run.extent("resid") == {"n_tokens": N_TOKENS, "partitions": indices}


def test_nothing_is_read_until_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = LocalStore.get

    async def note(self: LocalStore, key: str, *args: Any, **options: Any) -> Any:
        if "/c/" in key:
            read.append(key)
        return await get(self, key, *args, **options)

    monkeypatch.setattr(LocalStore, "get", note)
    again = Lake(run.store.url).run()
    resid = again.resid
    chosen = resid.isel(boundary=2, token=0)
    assert again.resid_mid.shape == (3, N_TOKENS, 8)
    assert read == []
    with dask.config.set(scheduler="synchronous"):
        chosen.compute()
    assert {key.split("/c/")[1] for key in read} == {"2/0/0"}  # boundary 2, partition 0, and no other shard


def test_two_lakes_with_a_run_of_one_id_are_not_mixed_up(
    make_run: Callable[..., Run], values: dict[str, Array], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same capture on two machines: Dask must not take the one's numbers for the other's."""
    one = make_run(tmp_path_factory.mktemp("one"), shape=SHAPE, lengths=LENGTHS, values=values)
    more = {site: value + 1 for site, value in values.items()}
    two = make_run(tmp_path_factory.mktemp("two"), shape=SHAPE, lengths=LENGTHS, values=more)
    assert one.run_id == two.run_id
    assert float(abs(two.resid - one.resid).min().compute()) == 1


def test_weights_are_raw_float32(make_run: Callable[..., Run]) -> None:
    weights = {"W_out": np.arange(3 * 12 * 8, dtype=np.float32).reshape(3, 12, 8)}
    run = make_run(shape=SHAPE, weights=weights)
    np.testing.assert_array_equal(run.weight("W_out"), weights["W_out"])
    assert run.weight_array("W_out").chunks == (1, 12, 8)
    assert run.weight("W_U").shape == (8, 24)
    with pytest.raises(CorruptRun, match="W_Q"):
        run.weight("W_Q")


def test_an_older_snapshot_still_reads(run: Run, values: dict[str, Array]) -> None:
    """A reader takes extents from its manifest, never from the array's shape."""
    first, *others = run.manifest.partitions
    older = Manifest.from_json(
        run.manifest.to_json()
        | {
            "partitions": [
                {
                    "index": 0,
                    "n_rows": first.n_rows,
                    "n_pairs": first.n_pairs,
                    "n_documents": first.n_documents,
                }
            ],
            "sites": {"resid": [0], "pattern": [0]},
        }
    )
    reader = Run(run.store, older)
    assert others
    np.testing.assert_array_equal(reader.pattern.to_numpy(), values["pattern"][:, :, : first.n_pairs])


# -- a damaged lake ---------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda _: None,
    "empty": lambda _: b"",
    "cut": lambda content: content[:-1],
    "changed": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


def damage(run: Run, name: str, how: str) -> None:
    """Change an object of a run or of its model, once it has been read whole."""
    content = DAMAGE[how](run.store.read(name))
    run.store.write(name, content) if content is not None else run.store.delete(name)


@pytest.mark.parametrize("url", [None, "memory://test-damage/lake"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("resid/c/2/1/0", lambda run: run.read("resid", 2, run.manifest.partitions[1])),
        ("resid/c/2/1/0", lambda run: run.array("resid")[2, 16:17]),
        ("resid/c/2/1/0", lambda run: run.array("resid").oindex[2, [0, 16]]),
        ("resid/c/2/1/0", lambda run: run.array("resid").vindex[[2], [16], [0]]),
        ("resid/c/2/1/0", lambda run: run.resid.compute()),
        ("attn_out/c/0/0/0", lambda run: run.resid_mid.compute()),
        ("pattern/c/1/0/0", lambda run: run.attention(0, 1)),
        ("mlp_post/zarr.json", lambda run: run.mlp_post),
    ],
)
def test_damaged_values_are_never_given_for_what_was_captured(
    make_run: Callable[..., Run], url: str | None, how: str, name: str, read: Callable[[Run], object]
) -> None:
    run = make_run(url, shape=SHAPE, lengths=LENGTHS)
    read(run)
    damage(run, f"runs/{run.run_id}/activations.zarr/{name}", how)
    again = Lake(run.store.url).run()
    with pytest.raises(CorruptRun, match=name if how == "gone" else name.partition("/")[0]) as caught:
        read(again)
    assert "layerlake verify" in caught.value.hint
    run.store.delete("")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["W_out/c/1/0/0", "W_out/zarr.json"])
def test_damaged_weights_are_never_given_for_the_model_s(
    make_run: Callable[..., Run], how: str, name: str
) -> None:
    run = make_run(shape=SHAPE)
    damage(run, f"models/{run.manifest.model_id}/weights.zarr/{name}", how)
    with pytest.raises(CorruptRun, match=name if how == "gone" else "W_out"):
        run.weight("W_out")
    if not name.endswith(".json"):
        assert np.asarray(run.weight_array("W_out")[0]).any()


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_bands_are_never_given(run: Run, how: str) -> None:
    name = f"runs/{run.run_id}/attn_band/part-00000001.parquet"
    damage(run, name, how)
    with pytest.raises(CorruptRun, match=name):
        run.attn_band  # noqa: B018


def test_rows_are_read_across_partitions(run: Run) -> None:
    spans = [np.arange(*run.span("resid", partition)) for partition in run.manifest.partitions]
    for rows in (np.concatenate(spans), np.array([span[-1] for span in spans]), spans[1][1:2], spans[0][:0]):
        found = run.read_rows("resid", 2, rows)
        np.testing.assert_array_equal(found, run.array("resid").oindex[2, rows])
    short: Any
    for short in (np.array([0, 17], np.uint8), range(0, 5, 2)):
        np.testing.assert_array_equal(
            run.read_rows("resid", 2, short), run.array("resid").oindex[2, np.asarray(short, np.int64)]
        )
    pairs = np.concatenate([np.arange(*run.span("pattern", p))[::3] for p in run.manifest.partitions])
    packed = np.asarray(run.array("pattern").oindex[1, :, pairs])
    np.testing.assert_array_equal(run.read_rows("pattern", 1, pairs), packed)
    np.testing.assert_array_equal(run.read_rows("pattern", 1, pairs, head=1), packed[1])


def test_rows_that_are_not_there_are_refused(run: Run) -> None:
    _, end = run.span("resid", run.manifest.partitions[0])
    one = np.array([0])
    for site, layer, rows, head in (
        ("resid", 4, one, None),
        ("resid", -1, one, None),
        ("resid", 0, np.array([end]), None),
        ("resid", 0, np.array([10**6]), None),
        ("resid", 0, np.array([0, 2**62]), None),
        ("resid", 0, np.array([-1]), None),
        ("pattern", 0, one, 2),
    ):
        with pytest.raises(IndexError):
            run.read_rows(site, layer, rows, head=head)
    for kind in (np.int64, np.uint32):
        with pytest.raises(ValueError, match="ascend"):
            run.read_rows("resid", 0, np.array([1, 0], kind))
    with pytest.raises(IndexError, match="no heads"):
        run.read_rows("resid", 0, one, head=0)
    for site, words in (("attn_band", "is a table"), ("resid_mid", "not at all")):
        with pytest.raises(SiteNotFound, match=words):
            run.read_rows(site, 0, one)


def test_what_no_snapshot_names_may_be_missing(run: Run) -> None:
    """An open capture has made the array longer, and has not come far."""
    first, second, *_ = run.manifest.partitions
    part = Run(run.store, replace(run.manifest, sites={"resid": (0,), "pattern": (0,)}))
    for name in ("resid/c/1/1/0", "pattern/c/1/0/1"):
        run.store.delete(f"runs/{run.run_id}/activations.zarr/{name}")
    assert part.read("resid", 1, first).any()
    for site in ("resid", "pattern"):
        with pytest.raises(SiteNotFound, match=f"'{site}' in 1 of its .* partitions only"):
            part.read(site, 1, second)
        start, stop = run.span(site, second)
        last_axis = {"resid": np.s_[1, start:stop], "pattern": np.s_[1, :, start:stop]}
        assert not np.any(part.array(site)[last_axis[site]])  # as it lies
    with pytest.raises(CorruptRun, match="resid/c/1/1/0 is missing"):
        run.read("resid", 1, second)


def test_a_wrong_selection_is_no_damage(run: Run) -> None:
    with pytest.raises(IndexError):
        run.array("resid")[99]


# -- how it is read ---------------------------------------------------------------------------------


def test_a_partition_is_read_at_once(make_run: Callable[..., Run], counting: type[Any]) -> None:
    make_run("counting://lake")
    run = Lake("counting://lake").run()
    counting.calls.clear()
    for partition in run.manifest.partitions:
        run.read("resid", 1, partition)
    assert counting.calls == {"cat_file": len(run.manifest.partitions)}


@pytest.mark.parametrize("url", [None, "memory://test-pickle/lake"])
def test_arrays_and_runs_travel_to_other_processes(make_run: Callable[..., Run], url: str | None) -> None:
    run = make_run(url)
    for name in ("resid", "pattern"):
        array = pickle.loads(pickle.dumps(run.array(name)))  # noqa: S301
        np.testing.assert_array_equal(array[...], run.array(name)[...])
    assert run.weight("W_out").any()
    again = pickle.loads(pickle.dumps(run))  # noqa: S301
    np.testing.assert_array_equal(again.weight("W_out"), run.weight("W_out"))
    run.store.delete(f"runs/{run.run_id}/activations.zarr/resid/c/1/0/0")
    with pytest.raises(CorruptRun, match="resid/c/1/0/0 is missing"):
        again.read("resid", 1, run.manifest.partitions[0])
    run.store.delete("")


def test_a_run_says_what_it_holds(run: Run) -> None:
    text = repr(run)
    assert run.run_id in text
    assert f"{N_TOKENS} tokens of synthetic" in text
    assert "mlp_post" in text


def test_bfloat16_bits_become_numbers() -> None:
    assert decode(np.array([0x3F80, 0xC020, 0x0000], np.uint16), "bfloat16").tolist() == [1.0, -2.5, 0.0]
    kept = np.array([1.5], np.float16)
    assert decode(kept, "float16") is kept


def test_reading_documents_needs_nothing_that_somebody_else_has_imported(run: Run) -> None:
    """A fresh interpreter that has imported the catalog alone."""
    code = (
        "import sys; from layerlake.catalog.lake import Lake; run = Lake(sys.argv[1]).run();"
        "print(run.stored_documents.num_rows, run.attention(0, 0).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run.store.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"{len(LENGTHS)} (2, 5, 5)"
