"""Carry out interventions: batches through trees of schedules, from the stored residual stream on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..catalog.errors import PlanError
from ..catalog.interventions import INTERVENTIONS, GrowingFinding
from ..catalog.schedules import Intervention, Route, Step, branch, routes_from
from ..catalog.sizes import parse_nbytes
from ..console import CaptureProgress, silent
from .batches import Batch
from .blocks import Blocks
from .execute import numerics
from .interventions import InterventionPlan
from .memory import PeakMemory, keep_freed
from .model import OpenModel, open_model
from .outcomes import Baseline, Outcomes
from .swap_cosines import compare_swaps
from .units import Unit

if TYPE_CHECKING:
    import torch

__all__ = ["InterventionOutcome", "execute_interventions"]


@dataclass(slots=True)
class InterventionOutcome:
    """What an execution did."""

    n_rows: int = 0
    """Rows stored."""
    n_batches: int = 0
    n_blocks: int = 0
    """Blocks executed, each on one batch."""
    peak_host_nbytes: int | None = None
    """The most host memory in that time, beyond what was taken before; None where the system does not tell."""

    def to_json(self) -> dict[str, int | None]:
        """Return the numbers."""
        return asdict(self)


def execute_interventions(
    plan: InterventionPlan, *, model: OpenModel | None = None, progress: CaptureProgress = silent
) -> InterventionOutcome:
    """Run what is missing, and store it unit by unit; after a crash, what is stored is not run again.

    Costs the blocks that the plan names for every batch, and an unembedding for every schedule.

    Parameters
    ----------
    plan : InterventionPlan
        See :func:`layerlake.capture.interventions.plan_intervention`.
    model : OpenModel, optional
        The plan's model, if it is open already.
    progress : callable, optional
        Is told how many tokens have gone through.

    Raises
    ------
    PlanError
        One document does not fit into the memory, or the model gives no numbers under an intervention.
    CorruptRun
        The stored residual stream is not finite.
    """
    import torch

    outcome = InterventionOutcome()
    if not plan.units:
        return outcome
    if model is None:
        compute_dtype = plan.run.manifest.identity["numerics"]["compute_dtype"]
        model = open_model(plan.model, device=plan.spec.device, compute_dtype=compute_dtype)
    total, done = sum(unit.n_tokens for unit in plan.units), 0
    keep_freed()
    with PeakMemory() as peak, numerics(torch.get_num_threads()), torch.inference_mode():
        findings = {unit.view: plan.finding(unit.view) for unit in plan.units}
        trim = partial(peak.trim_above, parse_nbytes(plan.spec.max_memory) // 4)
        blocks = Blocks(model, trim=trim)
        for unit in plan.units:
            found: list[tuple[Intervention, pa.Table]] = []
            for documents in unit.batches:
                progress("intervene", done, total)
                batch = Batch(plan.run, blocks, documents)
                if unit.view == "interventions":
                    found += _Walk(plan, batch).measure(unit.interventions)
                else:
                    found += compare_swaps(plan, batch, unit.interventions)
                outcome.n_batches += 1
                done += sum(len(document.token_ids) for document in documents)
            outcome.n_rows += _write(findings[unit.view], unit, found)
    outcome.n_blocks, outcome.peak_host_nbytes = blocks.n_executed, peak.nbytes
    progress("intervene", total, total)
    return outcome


def _write(finding: GrowingFinding, unit: Unit, found: Sequence[tuple[Intervention, pa.Table]]) -> int:
    """Store a unit, without what another process has stored since the plan was made; return the rows."""
    held, lengths = finding.held(), {document.number: len(document.token_ids) for document in unit.documents}
    lacking: dict[tuple[int, ...], list[Intervention]] = {}
    for intervention in unit.interventions:
        known = held.get(intervention.name, ())
        numbers = tuple(number for number in lengths if number not in known)
        lacking.setdefault(numbers, []).append(intervention)
    lacking.pop((), None)
    n_rows = 0
    for numbers, interventions in lacking.items():
        tables = [table for intervention, table in found if intervention in interventions]
        table = pa.concat_tables(tables)
        table = table.filter(np.isin(table["document"].to_numpy(), numbers))
        finding.write(
            interventions=interventions,
            documents=numbers,
            n_tokens=sum(lengths[number] for number in numbers),
            table=table,
        )
        n_rows += len(table)
    return n_rows


class _Walk:
    """A batch on its way through trees of schedules."""

    def __init__(self, plan: InterventionPlan, batch: Batch) -> None:
        self._plan, self._batch, self._blocks = plan, batch, batch.blocks
        n_layers = plan.run.shape.n_layers
        last = batch.stored(n_layers) if plan.spec.resume else self._run(map(Step, range(n_layers)))
        self._baseline = Baseline(self._blocks, batch.at_positions(last), batch.targets)

    def measure(self, interventions: Iterable[Intervention]) -> Iterator[tuple[Intervention, pa.Table]]:
        """Yield what comes of each intervention: ``INTERVENTIONS``."""
        is_resumed = self._plan.spec.resume
        for start, routes in routes_from(interventions, is_resumed=is_resumed).items():
            if is_resumed:
                yield from self._walk(self._batch.stored(start), routes, boundary=start)
                continue
            for route in routes:
                is_own = route.intervention.kind == "none"
                end = None if is_own else self._run(route.steps)
                yield route.intervention, self._table(route.intervention, end)

    def _walk(
        self, residual: torch.Tensor, routes: Sequence[Route], boundary: int | None = None
    ) -> Iterator[tuple[Intervention, pa.Table]]:
        """Follow schedules as far as they go together, then each group by itself; from a stored boundary, or not."""
        done, further = branch(routes)
        while not done and len(further) == 1:  # nothing is to be kept
            ((step, routes),) = further.items()
            residual, boundary = self._take(step, residual, boundary), None
            done, further = branch(routes)
        for intervention in done:
            yield intervention, self._table(intervention, None if intervention.kind == "none" else residual)
        for step, rest in further.items():
            yield from self._walk(self._take(step, residual, boundary), rest)

    def _take(self, step: Step, residual: torch.Tensor, boundary: int | None) -> torch.Tensor:
        """Return the residual stream behind a step: from the lake if it holds what the layer still adds."""
        site = self._plan.stored_part(step) if step.layer == boundary else None
        return (
            self._blocks.run(step, residual)
            if site is None
            else residual + self._batch.stored(step.layer, site)
        )

    def _run(self, steps: Iterable[Step]) -> torch.Tensor:
        residual = self._batch.embedding
        for step in steps:
            residual = self._blocks.run(step, residual)
        return residual

    def _table(self, intervention: Intervention, residual: torch.Tensor | None) -> pa.Table:
        """Measure the end of a schedule, or the unmodified model if it has none: ``INTERVENTIONS``."""
        batch, own = self._batch, self._baseline.outcomes
        found = own if residual is None else self._baseline.compare(batch.at_positions(residual))
        self._blocks.trim()
        _require_numbers(found, intervention)
        numbers = np.array([document.number for document in batch.documents], dtype=np.int64)
        columns: dict[str, Any] = {
            "document": numbers[batch.number_in_batch],
            "position": batch.positions.astype(np.int32),
            "row": batch.rows,
            "kl_nats": found.kl_nats,
            "agree": found.top1 == own.top1,
            "correct": found.top1 == batch.targets.cpu().numpy(),
            "loss_nats": found.loss_nats,
            "delta_loss_nats": found.loss_nats - own.loss_nats,
            "entropy_bits": found.entropy_bits,
            "delta_entropy_bits": found.entropy_bits - own.entropy_bits,
        }
        same = {
            "run": self._plan.run.run_id,
            "kind": intervention.kind,
            "layer": intervention.layer,
            "span": intervention.span,
            "schedule": intervention.schedule,
            "resumes_at": intervention.resumes_at if self._plan.spec.resume else 0,
            **self._plan.params("interventions"),
        }
        for name, value in same.items():
            columns[name] = pa.repeat(pa.scalar(value, INTERVENTIONS.field(name).type), len(batch.rows))
        return pa.table({name: columns[name] for name in INTERVENTIONS.names}, schema=INTERVENTIONS)


def _require_numbers(found: Outcomes, intervention: Intervention) -> None:
    if not np.isfinite(found.loss_nats).all():
        raise PlanError(
            f"The model gives no numbers under {intervention.kind} {intervention.schedule}: its values overflow.",
            hint="Capture and intervene in --compute-dtype float32.",
        )
