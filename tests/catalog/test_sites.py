"""Names of sites and lists of layers, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.catalog.errors import SiteNotFound
from layerlake.catalog.sites import SITES, parse_layers, parse_sites


def test_names_come_out_in_the_order_of_storage_and_once() -> None:
    assert parse_sites("pattern, resid_pre,resid_post,attn_out") == ("resid", "attn_out", "pattern")
    assert parse_sites(["mlp_post", "mlp_post"]) == ("mlp_post",)
    assert parse_sites(("all",)) == parse_sites("all") == tuple(SITES)
    assert parse_sites("attn_band,pattern") == ("pattern", "attn_band")


def test_a_site_is_an_array_or_a_table() -> None:
    dims = {name: site.dims for name, site in SITES.items() if site.is_array}
    assert dims == {
        "resid": ("boundary", "token", "d_model"),
        "attn_out": ("layer", "token", "d_model"),
        "mlp_out": ("layer", "token", "d_model"),
        "mlp_post": ("layer", "token", "d_mlp"),
        "pattern": ("layer", "head", "pair"),
    }
    assert SITES["attn_band"].dims == ("document", "layer", "head")


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        ("mlp_pots", "Did you mean 'mlp_post'?", "Sites are: resid"),
        ("resid_mid", "no site 'resid_mid'", "resid_mid = resid_pre + attn_out"),
        ("resid,", "no site ''", "Sites are"),
        ("", "No site was named", "Sites are"),
        ((), "No site was named", "Sites are"),
    ],
)
def test_what_is_no_site_is_refused(names: str | tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(SiteNotFound, match=message.replace("?", r"\?")) as caught:
        parse_sites(names)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        ("0-2,5", (0, 1, 2, 5)),
        ("4-", (4, 5)),
        ("5, 0", (0, 5)),
        ("1-2,2-3", (1, 2, 3)),
    ],
)
def test_lists_of_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("text", ["6", "0-6", "-1", "", "a", "3-1", "1,,2", "1.5"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(SiteNotFound):
        parse_layers(text, 6)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_a_list_of_single_layers_is_that_set(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers)), 31) == tuple(sorted(layers))
