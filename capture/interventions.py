"""What an intervention will do: which schedules, on which documents, and how many blocks that is. Loads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..catalog.errors import ModelError, PlanError
from ..catalog.interventions import GrowingFinding, GrowingView
from ..catalog.layout import model_path
from ..catalog.mask import sample_positions
from ..catalog.run import Run
from ..catalog.schedules import Intervention, Numbers, Step, count_blocks, plan_interventions
from ..catalog.sites import parse_sites
from .blocks import require_family
from .description import ModelDescription, describe_model
from .partition import place_tokens
from .units import MeasuredDocument, Unit, plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["InterventionPlan", "InterventionSpec", "plan_intervention"]

_UNIT_ROWS = 1 << 18
"""What is stored together holds at most so many rows of a table."""

_FLOOR_DOCUMENTS = 4
_FLOOR_TOKENS = 32
"""The floor is measured on the beginnings of a few documents: enough to know its size, and next to nothing to run."""

_ANSWERS = ("choice", "continuation")
"""Roles of documents of which the span is what counts, and not the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterventionSpec:
    """What to do to a model, and what to look at. See :func:`layerlake.catalog.schedules.plan_interventions`."""

    drop: Numbers = None
    """Layers to leave out: ``all``, ``3``, ``0-5,9``, ``7-``."""
    swap: Numbers = None
    """Layers to exchange with the next."""
    repeat: Numbers = None
    """Lengths of blocks that run each of their layers twice: ``3,5``."""
    ablate_attn: Numbers = None
    """Layers whose attention adds nothing."""
    ablate_mlp: Numbers = None
    """Layers whose MLP adds nothing."""
    schedules: str | Sequence[str] = ()
    """Whole schedules: ``"0-4,6,5,7-"``."""
    swap_cosines: Numbers = None
    """Layers of which to compare what attention and MLP give before and after a swap with the next."""
    stale_kv: bool = False
    """A repeated layer sees the keys and values of its first run."""
    max_documents: int | None = None
    """The first so many documents; None is all."""
    positions: int | None = None
    """So many evaluation positions of each document; None is all. Of a task's answers all are looked at."""
    resume: bool = True
    """Begin at the stored residual stream; else at the embedding, every schedule by itself."""
    capture_sites: str | None = None
    """Sites to capture of each intervened model, each in a run of its own: ``resid,mlp_out``."""
    model: str | os.PathLike[str] | PreTrainedModel | None = None
    """Where the model is; None is where the run's capture found it."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of a model that is loaded already."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``."""
    max_memory: int | str = "4GiB"
    """Beyond the loaded model."""


@dataclass(frozen=True)
class InterventionPlan:
    """What will be run; ``units`` is empty where the lake holds all of it."""

    spec: InterventionSpec
    run: Run
    model: ModelDescription
    interventions: tuple[Intervention, ...]
    """All that was asked for, the unmodified model first; without the floor."""
    swaps: tuple[Intervention, ...]
    """Those of which cosines were asked for."""
    units: tuple[Unit, ...]

    def params(self, view: GrowingView) -> dict[str, Any]:
        """Return what of the request decides the numbers beyond schedule and document."""
        sampled = {"positions": None if self.has_answers else self.spec.positions}
        return sampled | {"is_resumed": self.spec.resume} if view == "interventions" else sampled

    def finding(self, view: GrowingView) -> GrowingFinding:
        """Return what the run has of a view with the parameters of the request."""
        return GrowingFinding(self.run.store, self.run.run_id, self.params(view), view=view)

    @cached_property
    def has_answers(self) -> bool:
        """Whether the documents are prompts of a task, of which only the answers are looked at."""
        return any(map(_is_answer, self.run.stored_documents["role"].unique().to_pylist()))

    @cached_property
    def has_outputs(self) -> bool:
        """Whether the run holds what attention and MLP give, so that cosines need not run the unmodified blocks."""
        return all(self.run.has_site(site) for site in ("attn_out", "mlp_out"))

    def stored_part(self, step: Step) -> str | None:
        """Return what the lake holds of a layer without a component, beside x_l: the site that makes x_l+1 of it."""
        if not step.without or (step.without == "attn" and self.run.shape.block == "sequential"):
            return None  # in a sequential block, the MLP sees that attention is gone
        site = "mlp_out" if step.without == "attn" else "attn_out"
        return site if self.run.has_site(site) else None

    def count_blocks(self, unit: Unit, *, is_resumed: bool) -> int:
        """Return the blocks that a unit costs, in all of its batches."""
        if unit.view == "interventions":
            n_blocks = count_blocks(
                unit.interventions, is_resumed=is_resumed, is_stored=lambda step: bool(self.stored_part(step))
            )
        else:  # two a swap, and the unmodified ones
            layers = [swap.layer for swap in unit.interventions if swap.layer is not None]
            unmodified = {near for layer in layers for near in (layer, layer + 1)}
            n_blocks = 2 * len(layers) + (0 if self.has_outputs else len(unmodified))
        return n_blocks * len(unit.batches)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of what is missing: what will be run."""
        main = [unit for unit in self.units if unit.is_main]
        others = [unit for unit in self.units if not unit.is_main]
        positions = {d.number: len(d.positions) for unit in reversed(self.units) for d in unit.documents}
        return {
            "run": self.run.run_id,
            "interventions": sum(intervention.kind != "none" for intervention in self.interventions),
            "documents": len(positions),
            "positions": sum(positions.values()),
            "batches": sum(len(unit.batches) for unit in self.units),
            "blocks": sum(self.count_blocks(unit, is_resumed=self.spec.resume) for unit in main),
            "blocks_without_resume": sum(self.count_blocks(unit, is_resumed=False) for unit in main),
            "floor_and_cosine_blocks": sum(self.count_blocks(unit, is_resumed=True) for unit in others),
        }


def plan_intervention(run: Run, spec: InterventionSpec) -> InterventionPlan:
    """Plan interventions on the model of a run. Reads its tables, hashes the model's files, loads no weights.

    Raises
    ------
    SiteNotFound
        The run holds no ``resid``, or a layer does not exist.
    PlanError
        Nothing was asked for, no document has a position to look at or one does not fit into the memory, or the run
        is itself one of an intervention.
    ModelError
        The model is not there any more, or is another one.
    AdapterMismatch
        The blocks of this family are not known to run by themselves.
    """
    run.require_sites("resid")
    require_family(run.shape.family)
    if run.manifest.schedule is not None:
        raise PlanError(
            f"Run {run.run_id} is one of an intervention already: {run.manifest.schedule}.",
            hint=f"Intervene in the unmodified model: --run {run.manifest.baseline}.",
        )
    n_layers = run.shape.n_layers
    for name, value in (("max_documents", spec.max_documents), ("positions", spec.positions)):
        if value is not None and value < 1:
            raise PlanError(f"{name} is {value}: there would be nothing to look at.", hint="Give 1 or more.")
    asked = plan_interventions(
        n_layers,
        drop=spec.drop,
        swap=spec.swap,
        repeat=spec.repeat,
        ablate_attn=spec.ablate_attn,
        ablate_mlp=spec.ablate_mlp,
        schedules=spec.schedules,
        stale_kv=spec.stale_kv,
    )
    if spec.capture_sites is not None:
        parse_sites(spec.capture_sites)
        if any(step.is_stale for intervention in asked for step in intervention.steps):
            raise PlanError(
                "With stale keys a block runs twice in one step: no site has one value there.",
                hint="Capture the true repetition, without --stale-kv.",
            )
        if not asked:
            raise PlanError(
                "No schedule was asked for that sites could be captured of.", hint="Such as --drop 3."
            )
    swaps = plan_interventions(n_layers, swap=spec.swap_cosines)
    if not asked and not swaps:
        raise PlanError("No intervention was asked for.", hint="Such as --drop all --swap all.")
    if asked:
        asked = (Intervention("none", None, None, tuple(map(Step, range(n_layers)))), *asked)
    documents = list(_measured_documents(run, spec))
    if not documents:
        raise PlanError(f"Run {run.run_id} has no document with a position to look at.")
    plan = InterventionPlan(spec, run, _describe(run, spec), asked, swaps, ())
    floor = _floor(asked, documents) if spec.resume else ((), ())
    units = (
        *_missing(plan, "interventions", (asked, documents), floor),
        *_missing(plan, "swap_cosine_documents", (swaps, documents)),
    )
    return replace(plan, units=units)


def _is_answer(role: str | None) -> bool:
    return role is not None and role.startswith(_ANSWERS)


def _describe(run: Run, spec: InterventionSpec) -> ModelDescription:
    """Describe the model that a run was captured from, and make sure that it is that one."""
    card = run.store.read_json(f"{model_path(run.manifest.model_id)}/model.json")
    is_loaded = spec.model is not None and not isinstance(spec.model, str | os.PathLike)
    if not card["location"] and not is_loaded:
        raise ModelError(
            f"Run {run.run_id} was captured from a model in memory.",
            hint="Pass it again: layerlake.intervene(LAKE, model=…, tokenizer=…).",
        )
    if card["location"] and is_loaded:
        raise ModelError(
            f"Run {run.run_id} was captured from files: a model in memory cannot be held against their digest.",
            hint="Say where they are: model=PATH.",
        )
    try:
        found = describe_model(
            spec.model or card["location"],
            revision=None if spec.model else card["revision"],
            tokenizer=spec.tokenizer,
            trust_remote_code="code" in card["digests"],
        )
    except ModelError as error:
        if spec.model:
            raise
        raise ModelError(
            f"The model of run {run.run_id} cannot be opened where it was: {error}",
            hint="Say where it is: --model PATH.",
        ) from error
    if (
        found.digests["weights"] != card["digests"]["weights"]
        or found.digests["config"] != card["digests"]["config"]
    ):
        raise ModelError(
            f"'{found.name}' is not the model of run {run.run_id}: its weights or its config differ.",
            hint=f"That one has the id {run.manifest.model_id}; its results would not be about the stored activations.",
        )
    # the same model under another folder's name is the same model
    return replace(found, name=run.manifest.model_name, digests=card["digests"])


def _measured_documents(run: Run, spec: InterventionSpec) -> Iterator[MeasuredDocument]:
    """Return the documents that were asked for, and where to look: at the answers of a task, else at the mask."""
    placed = place_tokens(run.stored_documents, run.tokens)
    n_taken = 0
    for row in run.stored_documents.to_pylist():
        document = placed[row["document"]]
        if _is_answer(row["role"]):
            positions = np.arange(max(1, row["span_start"]) - 1, row["span_end"] - 1, dtype=np.int64)
        else:
            positions = sample_positions(document.number, document.n_tokens, spec.positions)
        if not len(positions):
            continue
        yield MeasuredDocument(document.number, document.token_ids, document.row_start, positions)
        n_taken += 1
        if n_taken == spec.max_documents:
            return


def _floor(
    asked: Sequence[Intervention], documents: Sequence[MeasuredDocument]
) -> tuple[list[Intervention], list[MeasuredDocument]]:
    """Return a no-op at every boundary that something resumes at, and the beginnings of some documents."""
    identity = asked[0].steps if asked else ()
    starts = sorted({intervention.resumes_at for intervention in asked})
    floor = [Intervention("noop", start, 0, identity) for start in starts if start < len(identity)]
    beginnings = [document.beginning(_FLOOR_TOKENS) for document in documents[:_FLOOR_DOCUMENTS]]
    return floor, [document for document in beginnings if len(document.positions)]


def _missing(
    plan: InterventionPlan,
    view: GrowingView,
    *requests: tuple[Iterable[Intervention], Iterable[MeasuredDocument]],
) -> Iterator[Unit]:
    """Return what no part holds of some requests: by partition, and by which interventions are missing there."""
    held = plan.finding(view).held()
    rows = plan.run.manifest.geometry.partition_tokens
    for interventions, documents in requests:
        wanted: dict[tuple[int, tuple[Intervention, ...]], list[MeasuredDocument]] = {}
        for document in documents:
            missing = tuple(i for i in interventions if document.number not in held.get(i.name, ()))
            if missing:
                wanted.setdefault((document.row_start // rows, missing), []).append(document)
        for (_, missing), members in sorted(wanted.items(), key=lambda item: item[0][0]):
            for some in _cut(members, _UNIT_ROWS // len(missing)):
                batches = plan_batches(
                    plan.run, some, missing, device=plan.spec.device, max_memory=plan.spec.max_memory
                )
                yield Unit(view, batches, missing)


def _cut(documents: Iterable[MeasuredDocument], n_positions: int) -> Iterator[tuple[MeasuredDocument, ...]]:
    """Cut documents, in order, into pieces of at most so many positions, or one document.

    From the first on: what is left of them after a crash is cut as all of them were.
    """
    piece: list[MeasuredDocument] = []
    n_taken = 0
    for document in documents:
        if piece and n_taken + len(document.positions) > n_positions:
            yield tuple(piece)
            piece, n_taken = [], 0
        piece.append(document)
        n_taken += len(document.positions)
    if piece:
        yield tuple(piece)
