"""Directions: vectors with a name, saved with a run's findings, for SQL's ``project(vec, 'name')``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..catalog.errors import AnalysisError, SiteNotFound, did_you_mean
from ..catalog.findings import Finding, FindingKey, list_findings, write_finding
from ..catalog.run import Run
from ..catalog.sites import SITES
from ..catalog.stores import Store
from ..catalog.tables import read_parts
from .scan import SITE_RELATIONS

__all__ = ["DIRECTIONS", "read_directions", "save_direction"]

VERSION = 1

DIRECTIONS = pa.schema(
    [
        ("run", pa.string()),  # the one that it was saved with; its other runs see it, too
        ("name", pa.string()),
        ("model_id", pa.string()),
        ("site", pa.string()),  # where it was found: resid, mlp_post, …; NULL for one that belongs nowhere
        ("layer", pa.int32()),  # the boundary, of resid
        ("vec", pa.list_(pa.float32())),
    ]
)
"""``directions``: a row a direction."""


def save_direction(
    run: Run,
    name: str,
    vector: npt.ArrayLike,
    *,
    site: str | None = None,
    layer: int | None = None,
    normalise: bool = False,
    replace: bool = False,
) -> None:
    """Keep a vector under a name, for all runs of a run's model. The same again does nothing.

    Parameters
    ----------
    run : Run
        The run that it was drawn from; the direction goes when the run is removed.
    name : str
        Its name; a model has one direction of each.
    vector : array ``[width]``
        Finite numbers, kept as float32.
    site, layer : str and int, optional
        What it is a direction in: a relation with vectors, and its layer (boundary, of ``resid``). Checked against the
        model's shape, and recorded; any vector of that width can be projected on it.
    normalise : bool
        Whether it is divided by its Euclidean norm first. A projection is the dot product with what is stored.
    replace : bool
        Whether it takes the place of another one that this run has of that name.

    Raises
    ------
    AnalysisError
        It is no direction, or the name is taken.
    SiteNotFound
        The model has no such site or layer.
    """
    values = np.asarray(vector, dtype=np.float32)
    if values.ndim != 1 or not np.isfinite(values).all() or not values.any():
        raise AnalysisError(
            f"'{name}' is no direction: it has the shape {values.shape}, and {np.isfinite(values).sum():,} of its "
            f"{values.size:,} numbers are finite, {np.count_nonzero(values):,} not zero.",
            hint="A direction is one vector of finite numbers, [width], and not zero.",
        )
    if site is not None:
        _check_place(run, name, len(values), site, layer)
    if normalise:
        values = values / np.linalg.norm(values)
    row = {"run": run.run_id, "name": name, "model_id": run.manifest.model_id, "site": site, "layer": layer}
    table = pa.Table.from_pylist([row | {"vec": values}], DIRECTIONS)
    for other in read_directions(run.store).to_pylist():
        if (other["model_id"], other["name"]) != (run.manifest.model_id, name):
            continue
        if pa.Table.from_pylist([other], DIRECTIONS).drop(["run"]) == table.drop(["run"]):
            return
        if other["run"] != run.run_id or not replace:
            raise AnalysisError(
                f"The model {run.manifest.model_id} has another direction '{name}', saved with run {other['run']}.",
                hint="Take another name, or replace=True with that run.",
            )
    key = FindingKey("directions", VERSION, run.run_id, {"name": name}, {})
    write_finding(run.store, Finding("directions", {"directions": table}, (key,)))


def read_directions(store: Store) -> pa.Table:
    """Return all directions of a lake (:data:`DIRECTIONS`)."""
    return read_parts(store, [table.path for table in list_findings(store, "directions")], DIRECTIONS)


def _check_place(run: Run, name: str, width: int, site: str, layer: int | None) -> None:
    names = [each for each, relation in SITE_RELATIONS.items() if SITES[relation.sites[0]].rows == "token"]
    if site not in names:
        raise SiteNotFound(
            f"There are no vectors of '{site}'.{did_you_mean(site, names)}",
            hint=f"Sites with vectors are: {', '.join(names)}.",
        )
    relation = SITE_RELATIONS[site]
    if layer is not None and not 0 <= layer < relation.n_layers(run):
        raise SiteNotFound(f"{site} of {run.manifest.model_name} has no {relation.axis} {layer}.")
    expected = SITES[relation.sites[0]].width(run.shape)
    if width != expected:
        raise AnalysisError(
            f"'{name}' is no direction in {site}: it has {width} numbers, vectors there {expected}."
        )
