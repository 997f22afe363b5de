"""Rows of interventions without a model: random ones, in parts as ``layerlake intervene`` leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from layerlake.catalog.interventions import INTERVENTIONS, GrowingFinding
from layerlake.catalog.run import Run
from layerlake.catalog.schedules import Intervention, Step, plan_interventions

__all__ = ["every_position", "floor", "planned", "write_rows"]


def planned(n_layers: int, **asked: Any) -> list[Intervention]:
    """Plan interventions, the unmodified model in front."""
    return [Intervention("none", None, None, identity(n_layers)), *plan_interventions(n_layers, **asked)]


def floor(n_layers: int, *boundaries: int) -> list[Intervention]:
    """Plan no-ops."""
    return [Intervention("noop", boundary, 0, identity(n_layers)) for boundary in boundaries]


def identity(n_layers: int) -> tuple[Step, ...]:
    return tuple(map(Step, range(n_layers)))


def every_position(run: Run) -> dict[int, list[int]]:
    """Return the evaluation positions of each document."""
    table = run.stored_documents
    lengths = zip(table["document"].to_pylist(), table["n_tokens"].to_pylist(), strict=True)
    return {document: list(range(1, n - 1)) for document, n in lengths if n > 2}


def write_rows(
    run: Run,
    interventions: Sequence[Intervention],
    at: Mapping[int, Sequence[int]],
    *,
    seed: int = 0,
    positions: int | None = None,
    is_resumed: bool = True,
    **columns: Any,
) -> pd.DataFrame:
    """Write one part of random rows, and return them.

    Parameters
    ----------
    at : mapping
        document → positions.
    columns
        What is not random: a value for all rows, or a function of (intervention, document, position).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in interventions:
        for document, places in at.items():
            for position in places:
                row: dict[str, Any] = {
                    "run": run.run_id,
                    "kind": i.kind,
                    "layer": i.layer,
                    "span": i.span,
                    "schedule": i.schedule,
                    "resumes_at": i.resumes_at if is_resumed else 0,
                    "document": document,
                    "position": position,
                    "row": position,
                    **dict(
                        zip(("kl_nats", "loss_nats", "entropy_bits"), rng.exponential(size=3), strict=True)
                    ),
                    **dict(zip(("delta_loss_nats", "delta_entropy_bits"), rng.normal(size=2), strict=True)),
                    **dict(zip(("agree", "correct"), (rng.random(2) < 0.6).tolist(), strict=True)),
                    "positions": positions,
                    "is_resumed": is_resumed,
                }
                given = {k: v(i, document, position) if callable(v) else v for k, v in columns.items()}
                rows.append(row | given)
    table = pa.Table.from_pylist(rows, schema=INTERVENTIONS)
    GrowingFinding(run.store, run.run_id, {"positions": positions, "is_resumed": is_resumed}).write(
        interventions=interventions,
        documents=list(at),
        n_tokens=sum(map(len, at.values())),
        table=table,
    )
    frame: pd.DataFrame = table.to_pandas()
    return frame.astype({f.name: float for f in table.schema if pa.types.is_floating(f.type)})
