"""Layer schedules: the order in which a model's blocks run. Pure: no model, no store.

The unmodified model is the schedule ``0 … L-1``, the *identity*. To drop a layer is to leave it out, to swap two is to
exchange them, to repeat some is to name each of them twice. What a schedule begins with, as far as it is the identity,
need not be run where the residual stream is stored: it *resumes* at the boundary behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import PlanError
from .sites import parse_layers

__all__ = [
    "Intervention",
    "Kind",
    "Numbers",
    "Route",
    "Step",
    "branch",
    "count_blocks",
    "count_streams",
    "format_schedule",
    "parse_schedule",
    "plan_interventions",
    "routes_from",
]

Kind = Literal["none", "noop", "drop", "swap", "repeat", "ablate_attn", "ablate_mlp", "schedule"]
"""``none`` is the unmodified model, ``noop`` the unmodified rest of it behind a stored boundary: the floor."""

Numbers = str | int | Iterable[int] | None
"""Layers or lengths: ``"all"``, ``"0-5,9"``, ``"7-"``, ``3``, ``[0, 1]``."""


@dataclass(frozen=True, slots=True)
class Step:
    """One block of a schedule."""

    layer: int
    without: Literal["", "attn", "mlp"] = ""
    """The component whose output, biases included, is left out; the block's MLP still sees what there is."""
    is_stale: bool = False
    """Run twice, the second time on the keys and values of the first: what a KV cache makes of a repeated layer."""

    @property
    def n_blocks(self) -> int:
        """How often a block is executed."""
        return 1 + self.is_stale

    def __str__(self) -> str:
        if self.is_stale:
            return f"{self.layer}(stale)"
        return f"{self.layer}(-{self.without})" if self.without else str(self.layer)


_PLAIN = re.compile(r"\d+")
_MARKS: dict[str, dict[str, Any]] = {
    "": {},
    "-attn": {"without": "attn"},
    "-mlp": {"without": "mlp"},
    "stale": {"is_stale": True},
}
_FALLING = re.compile(r"(?P<from>\d+)-(?P<to>\d+)")
_MARKED = re.compile(r"(?P<layer>\d+)\((?P<mark>-attn|-mlp|stale)\)")


def format_schedule(steps: Sequence[Step]) -> str:
    """Return a schedule as text: stretches of ascending layers as ranges.

    Examples
    --------
    >>> format_schedule([Step(0), Step(1), Step(2), Step(4), Step(3), Step(5, "mlp")])
    '0-2,4,3,5(-mlp)'
    """
    stretches: list[list[Step]] = []
    for step in steps:
        last = stretches[-1][-1] if stretches else None
        if last is not None and str(last) == str(step.layer - 1) and str(step) == str(step.layer):
            stretches[-1].append(step)
        else:
            stretches.append([step])
    return ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in stretches)


def parse_schedule(text: str, n_layers: int) -> tuple[Step, ...]:
    """Return the steps of a schedule; layers may stand in any order, ranges may fall, and all may come more than once.

    Raises
    ------
    SiteNotFound
        It names a layer that does not exist.
    PlanError
        It names none.

    Examples
    --------
    >>> format_schedule(parse_schedule("0-1, 3,2,4-", 6))
    '0-1,3,2,4-5'
    >>> format_schedule(parse_schedule("0,3-1,4-", 6))
    '0,3,2,1,4-5'
    """
    steps: list[Step] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        marked = _MARKED.fullmatch(part)
        falling = _FALLING.fullmatch(part)
        if falling and int(falling["from"]) > int(falling["to"]):
            layers = parse_layers(f"{falling['to']}-{falling['from']}", n_layers)[::-1]
        else:
            layers = parse_layers(marked["layer"] if marked else part, n_layers)
        mark = _MARKS[marked["mark"] if marked else ""]
        steps += [Step(layer, **mark) for layer in layers]
    if not steps:
        raise PlanError(f"'{text}' is no schedule: it names no layer.", hint='Such as "0-4,6,5,7-".')
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class Intervention:
    """A schedule, and what it is called."""

    kind: Kind
    layer: int | None
    """The layer; of a swap the lower one, of a repeat the first; of a no-op the boundary that it resumes at."""
    span: int | None
    """How many layers are changed."""
    steps: tuple[Step, ...]

    @property
    def schedule(self) -> str:
        """The schedule as text."""
        return format_schedule(self.steps)

    @property
    def name(self) -> str:
        """What tells it from all others of a model."""
        return f"{self.kind} {self.layer} {self.schedule}"

    @property
    def resumes_at(self) -> int:
        """The boundary of the unmodified model behind which nothing is as it was."""
        if self.kind == "noop" and self.layer is not None:
            return self.layer
        same = (step == Step(place) for place, step in enumerate(self.steps))
        return next((place for place, is_same in enumerate(same) if not is_same), len(self.steps))


def plan_interventions(
    n_layers: int,
    *,
    drop: Numbers = None,
    swap: Numbers = None,
    repeat: Numbers = None,
    ablate_attn: Numbers = None,
    ablate_mlp: Numbers = None,
    schedules: str | Iterable[str] = (),
    stale_kv: bool = False,
) -> tuple[Intervention, ...]:
    """Return the interventions that were asked for, each once.

    Parameters
    ----------
    n_layers : int
        The model's L.
    drop, ablate_attn, ablate_mlp : str, int or iterable of int, optional
        Layers (:func:`layerlake.catalog.sites.parse_layers`): left out whole, or one component of them.
    swap : str, int or iterable of int, optional
        Layers that change places with the next; ``all`` and open ranges end before the last.
    repeat : str, int or iterable of int, optional
        Lengths of blocks, each layer of which runs twice in place; every start.
    schedules : str or iterable of str
        Whole schedules (:func:`parse_schedule`).
    stale_kv : bool
        Whether a repeated layer sees the keys and values of its first run, as the authors' script has it.

    Raises
    ------
    SiteNotFound
        A layer does not exist.
    PlanError
        The last layer is to be swapped, a block to be repeated is as long as no block, or nothing is repeated whose
        keys could be stale.
    """
    drop, swap, repeat, ablate_attn, ablate_mlp = map(_as_text, (drop, swap, repeat, ablate_attn, ablate_mlp))
    if stale_kv and repeat is None:
        raise PlanError(
            "Nothing is repeated, so no keys and values are stale.", hint="--stale-kv goes with --repeat."
        )
    identity = tuple(map(Step, range(n_layers)))
    found = [
        Intervention("drop", layer, 1, identity[:layer] + identity[layer + 1 :])
        for layer in _layers(drop, n_layers)
    ]
    for layer in _layers(swap, n_layers):
        if layer < n_layers - 1:
            pair = identity[layer + 1], identity[layer]
            found.append(Intervention("swap", layer, 2, identity[:layer] + pair + identity[layer + 2 :]))
        elif swap is not None and _names_last(swap, n_layers):
            raise PlanError(
                f"Layer {layer} is the last: there is none to swap it with.",
                hint=f"--swap takes layers 0 … {n_layers - 2}, or all.",
            )
    for length in _lengths(repeat, n_layers):
        for start in range(n_layers - length + 1):
            twice = [
                step
                for layer in range(start, start + length)
                for step in ([Step(layer, is_stale=True)] if stale_kv else [Step(layer)] * 2)
            ]
            steps = (*identity[:start], *twice, *identity[start + length :])
            found.append(Intervention("repeat", start, length, steps))
    for kind, without, layers in (("ablate_attn", "attn", ablate_attn), ("ablate_mlp", "mlp", ablate_mlp)):
        for layer in _layers(layers, n_layers):
            steps = (*identity[:layer], Step(layer, without), *identity[layer + 1 :])  # type: ignore[arg-type]
            found.append(Intervention(kind, layer, 1, steps))  # type: ignore[arg-type]
    texts = (schedules,) if isinstance(schedules, str) else schedules
    found += [Intervention("schedule", None, None, parse_schedule(text, n_layers)) for text in texts]
    return tuple(dict.fromkeys(found))


def _layers(text: str | None, n_layers: int) -> tuple[int, ...]:
    return () if text is None else parse_layers(text, n_layers)


def _as_text(given: Numbers) -> str | None:
    """Return layers or lengths as the command line has them."""
    if given is None or isinstance(given, str):
        return given
    return ",".join(map(str, [given] if isinstance(given, int) else given)) or None


def _names_last(text: str, n_layers: int) -> bool:
    """Tell whether layers name the last one, and not just all from somewhere on."""
    parts = (part.strip() for part in text.split(","))
    closed = (part for part in parts if part != "all" and not part.endswith("-"))
    return any(n_layers - 1 in parse_layers(part, n_layers) for part in closed)


def _lengths(text: str | None, n_layers: int) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    lengths = tuple(int(part) if _PLAIN.fullmatch(part.strip()) else 0 for part in parts)
    wrong = [part for part, length in zip(parts, lengths, strict=True) if not 1 <= length <= n_layers]
    if wrong:
        raise PlanError(
            f"A block of '{wrong[0]}' layers cannot be repeated.",
            hint=f"--repeat takes lengths from 1 to {n_layers}, such as 3,5.",
        )
    return lengths


@dataclass(frozen=True, slots=True)
class Route:
    """An intervention on its way: what of its schedule is still to be run."""

    intervention: Intervention
    steps: tuple[Step, ...]


def routes_from(interventions: Iterable[Intervention], *, is_resumed: bool = True) -> dict[int, list[Route]]:
    """Return boundary → the interventions that begin there; without resuming, all of them at the embedding."""
    routes: dict[int, list[Route]] = {}
    for intervention in interventions:
        start = intervention.resumes_at if is_resumed else 0
        routes.setdefault(start, []).append(Route(intervention, intervention.steps[start:]))
    return dict(sorted(routes.items()))


def branch(routes: Iterable[Route]) -> tuple[list[Intervention], Mapping[Step, list[Route]]]:
    """Return the interventions that are at their end, and the others by the step that they take next together."""
    done: list[Intervention] = []
    further: dict[Step, list[Route]] = {}
    for route in routes:
        if route.steps:
            further.setdefault(route.steps[0], []).append(Route(route.intervention, route.steps[1:]))
        else:
            done.append(route.intervention)
    return done, further


def count_blocks(
    interventions: Iterable[Intervention],
    *,
    is_resumed: bool = True,
    is_stored: Callable[[Step], bool] = lambda _: False,
) -> int:
    """Return how many blocks are executed for each batch.

    Resumed, interventions share the blocks that they begin with; without resuming each runs its own, and the
    unmodified model is run once beside them.

    Parameters
    ----------
    interventions : iterable of Intervention
        The interventions.
    is_resumed : bool
        Whether they begin at the stored residual stream.
    is_stored : callable
        Tells of a step that resumes at its own layer whether the lake holds what comes of it.

    Examples
    --------
    >>> both = plan_interventions(12, drop="all", swap="all")
    >>> count_blocks(both), 12 * 11 // 2 + (12 * 13 // 2 - 1) - 11
    (132, 132)
    """
    if not is_resumed:
        return sum(step.n_blocks for intervention in interventions for step in intervention.steps)
    n_blocks = 0
    for start, routes in routes_from(interventions).items():
        n_spared = sum(step.n_blocks for step in branch(routes)[1] if step.layer == start and is_stored(step))
        n_blocks += _count(routes) - n_spared
    return n_blocks


def _count(routes: Iterable[Route]) -> int:
    _, further = branch(routes)
    return sum(step.n_blocks + _count(rest) for step, rest in further.items())


def count_streams(interventions: Iterable[Intervention]) -> int:
    """Return how many residual streams are held at once: those at which schedules part, and the one on its way.

    Examples
    --------
    >>> count_streams(plan_interventions(12, drop="all", swap="all"))
    2
    """
    return max(map(_streams, routes_from(interventions).values()), default=1)


def _streams(routes: Iterable[Route]) -> int:
    done, further = branch(routes)
    deepest = max(map(_streams, further.values()), default=0)
    is_kept = bool(done) or len(further) != 1
    return deepest + is_kept
