"""Sites: the places in a model whose values are stored, in TransformerLens's words.

===========  ============================  =====================================================
site         dimensions                    what
===========  ============================  =====================================================
resid        boundary, token, d_model      the residual stream x_0 … x_L; never normed
attn_out     layer, token, d_model         what attention adds to it
mlp_out      layer, token, d_model         what the MLP adds to it
mlp_post     layer, token, d_mlp           the neurons: the vector that W_out multiplies
pattern      layer, head, pair             attention weights, the causal triangle packed
attn_band    document, layer, head         their sums near the diagonal and over BOS, in Parquet
===========  ============================  =====================================================

``resid_pre[l]`` is ``resid[l]`` and ``resid_post[l]`` is ``resid[l + 1]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import PlanError, SiteNotFound, did_you_mean
from .shapes import ModelShape

__all__ = ["ANALYSIS_SITES", "SITES", "Site", "parse_analyses", "parse_layers", "parse_sites"]

_ALIASES = {"resid_pre": "resid", "resid_post": "resid"}


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model, and how its values lie in an array, or in a table."""

    name: str
    axis: Literal["boundary", "layer"]
    """What the first dimension counts: layers 0 … L-1, or the boundaries 0 … L between them."""
    rows: Literal["token", "pair", "document"]
    """What the long dimension counts: tokens, (query, key) pairs of the packed triangle, or documents."""
    width_name: Literal["d_model", "d_mlp", "head"]
    """The third quantity: the vector's dimension, or the heads."""

    @property
    def is_array(self) -> bool:
        """Whether the values lie in a Zarr array; those of ``attn_band`` are rows of a Parquet table."""
        return self.rows != "document"

    @property
    def dims(self) -> tuple[str, str, str]:
        """The names of the array's dimensions, or of the table's first columns, in order."""
        orders = {
            "token": (self.axis, "token", self.width_name),
            "pair": (self.axis, self.width_name, "pair"),
            "document": ("document", self.axis, self.width_name),
        }
        return orders[self.rows]

    def n_layers(self, shape: ModelShape) -> int:
        """Return the length of the first dimension for a model: L, or L + 1 boundaries."""
        return shape.n_layers + (self.axis == "boundary")

    def width(self, shape: ModelShape) -> int:
        """Return the number of values in a row: d_model, d_mlp, or the number of heads."""
        return {"d_model": shape.d_model, "d_mlp": shape.d_mlp, "head": shape.n_heads}[self.width_name]


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("resid", "boundary", "token", "d_model"),
        Site("attn_out", "layer", "token", "d_model"),
        Site("mlp_out", "layer", "token", "d_model"),
        Site("mlp_post", "layer", "token", "d_mlp"),
        Site("pattern", "layer", "pair", "head"),
        Site("attn_band", "layer", "document", "head"),
    )
}
"""Every capturable site by name, in the order of storage."""

ANALYSIS_SITES: dict[str, tuple[tuple[str, ...], ...]] = {
    "lens": (("resid",),),
    "cka": (("resid",),),
    "neurons": ((),),
    "attention_locality": (("attn_band",), ("pattern",)),
    "subjoiner": (("pattern",),),
    "wic": (("resid",),),
    "ing": (("resid", "mlp_post"),),
    "norms": (("resid", "attn_out", "mlp_out"),),
    "interventions": (("resid",),),
    "intervention_summary": (("resid",),),
    "swap_cosines": (("resid",),),
    "benchmarks": (("resid",),),
    "stages": (("resid", "attn_band"), ("resid", "pattern")),
}
"""For each analysis the sets of sites that answer it, any of which will do, the preferred one first.

One empty set if the weights suffice, which every capture stores.
"""


def parse_sites(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the canonical site names for ``"resid,mlp_out"``, a list of names, or ``"all"``.

    Raises
    ------
    SiteNotFound
        A name is not a site that can be captured, or there is none.

    Examples
    --------
    >>> parse_sites("mlp_out,resid_post")
    ('resid', 'mlp_out')
    >>> parse_sites("all") == tuple(SITES)
    True
    """
    asked = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if asked == ["all"]:
        return tuple(SITES)
    if not any(asked):
        raise SiteNotFound("No site was named.", hint=f"Sites are: {', '.join(SITES)}, or 'all'.")
    chosen = set()
    for name in asked:
        canonical = _ALIASES.get(name, name)
        if canonical not in SITES:
            raise SiteNotFound(
                f"There is no site '{name}' to capture.{did_you_mean(name, [*SITES, *_ALIASES])}",
                hint=_SITE_HINTS.get(name, f"Sites are: {', '.join(SITES)}, or 'all'."),
            )
        chosen.add(canonical)
    return tuple(name for name in SITES if name in chosen)


def parse_analyses(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return the analyses that ``"lens,cka"``, a list of names, or ``"all"`` names.

    Raises
    ------
    PlanError
        A name is not an analysis, or there is none.

    Examples
    --------
    >>> parse_analyses("norms, lens")
    ('lens', 'norms')
    """
    asked = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if asked == ["all"]:
        return tuple(ANALYSIS_SITES)
    if not any(asked):
        raise PlanError(
            "No analysis was named.", hint=f"Analyses are: {', '.join(ANALYSIS_SITES)}, or 'all'."
        )
    for name in asked:
        if name not in ANALYSIS_SITES:
            raise PlanError(
                f"There is no analysis '{name}'.{did_you_mean(name, ANALYSIS_SITES)}",
                hint=f"Analyses are: {', '.join(ANALYSIS_SITES)}, or 'all'.",
            )
    return tuple(name for name in ANALYSIS_SITES if name in asked)


_SITE_HINTS = {
    "resid_mid": (
        "resid_mid is derived, not stored: capture resid and attn_out, and read resid_mid = resid_pre + attn_out "
        "(sequential blocks only)."
    ),
}


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Return the layers that ``"all"``, ``"3"``, ``"0-5,9"`` or ``"7-"`` names, sorted.

    Raises
    ------
    SiteNotFound
        A layer is not between 0 and ``n_layers - 1``, or the text is none of these forms.

    Examples
    --------
    >>> parse_layers("0-2,5-", 8)
    (0, 1, 2, 5, 6, 7)
    """
    if text == "all":
        return tuple(range(n_layers))
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if last else (n_layers - 1 if dash else low)
        except ValueError:
            raise SiteNotFound(
                f"'{text}' is not a list of layers.", hint="Write it as: all, 3, 0-5,9 or 7-."
            ) from None
        if not 0 <= low <= high < n_layers:
            raise SiteNotFound(f"Layers '{part}' are not all within 0 … {n_layers - 1}.")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))
