"""Schedules: what is asked for, where it resumes, and how many blocks that is."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlake.catalog.errors import PlanError, SiteNotFound
from layerlake.catalog.schedules import (
    Intervention,
    Route,
    Step,
    branch,
    count_blocks,
    count_streams,
    format_schedule,
    parse_schedule,
    plan_interventions,
    routes_from,
)

N_LAYERS = 7
STEPS = st.lists(
    st.builds(Step, st.integers(0, N_LAYERS - 1), st.sampled_from(["", "attn", "mlp"]))
    | st.builds(Step, st.integers(0, N_LAYERS - 1), is_stale=st.just(True)),
    min_size=1,
    max_size=12,
).map(tuple)
INTERVENTIONS = st.lists(STEPS, min_size=1, max_size=8).map(
    lambda schedules: [Intervention("schedule", None, None, steps) for steps in schedules]
)
IDENTITY = tuple(map(Step, range(N_LAYERS)))


@given(STEPS)
def test_what_is_written_is_read_again(steps: tuple[Step, ...]) -> None:
    assert parse_schedule(format_schedule(steps), N_LAYERS) == steps


def follow(routes: Iterable[Route], taken: tuple[Step, ...] = ()) -> dict[str, tuple[Step, ...]]:
    """Return the steps that each intervention has taken where it ends."""
    done, further = branch(routes)
    ends = {intervention.name: taken for intervention in done}
    for step, rest in further.items():
        ends |= follow(rest, (*taken, step))
    return ends


@given(INTERVENTIONS, st.booleans())
def test_every_route_ends_with_its_own_steps_in_order(
    interventions: list[Intervention], is_resumed: bool
) -> None:
    for start, routes in routes_from(interventions, is_resumed=is_resumed).items():
        for name, taken in follow(routes).items():
            (steps,) = {i.steps for i in interventions if i.name == name}
            assert IDENTITY[:start] + taken == steps
    names = [r.intervention.name for routes in routes_from(interventions).values() for r in routes]
    assert sorted(names) == sorted(i.name for i in interventions)


@given(INTERVENTIONS)
def test_sharing_costs_no_more_and_loses_nothing(interventions: list[Intervention]) -> None:
    alone = sum(count_blocks([intervention]) for intervention in interventions)
    assert max(count_blocks([i]) for i in interventions) <= count_blocks(interventions) <= alone
    assert count_blocks(interventions) <= count_blocks(interventions, is_resumed=False)
    assert 1 <= count_streams(interventions) <= len(interventions)


def test_streams_are_held_where_schedules_part() -> None:
    def asked(*texts: str) -> list[Intervention]:
        return [Intervention("schedule", None, None, parse_schedule(text, N_LAYERS)) for text in texts]

    assert count_streams(asked("0,2,1")) == 1
    assert count_streams(asked("0,2,1", "1,0")) == 1  # they begin at two boundaries
    assert count_streams(asked("0,2,1", "0,2,3")) == 2
    assert count_streams(asked("0,2,1", "0,2,1,4")) == 2  # the shorter one ends on the way of the longer
    assert count_streams(asked("0,2,1", "0,2,3,1", "0,2,3,5")) == 3


@pytest.mark.parametrize("n_layers", [1, 2, 3, 8, 12, 36])
def test_closed_forms(n_layers: int) -> None:
    """EXPERIMENTS §4, a block counted once a batch."""
    L = n_layers  # as in the formulas
    drop, swap = L * (L - 1) // 2, L * (L + 1) // 2 - 1
    assert count_blocks(plan_interventions(L, drop="all")) == drop
    assert count_blocks(plan_interventions(L, swap="all")) == swap
    both = plan_interventions(L, drop="all", swap="all")
    assert count_blocks(both) == drop + swap - (L - 1)  # drop l and swap l share block l + 1
    assert count_blocks(both, is_resumed=False) == L * (L - 1) + (L - 1) * L
    for B in range(1, min(L, 5) + 1):
        expected = sum(B - 1 + L - s for s in range(L - B + 1))
        for is_stale in (False, True):
            repeated = plan_interventions(L, repeat=str(B), stale_kv=is_stale)
            assert len(repeated) == L - B + 1
            # what is given twice in one step begins with the step's first run, which is not stored by itself
            assert count_blocks(repeated) == expected + (L - B + 1) * is_stale
    assert count_blocks(plan_interventions(L, ablate_mlp="all")) == L * (L + 1) // 2


def test_what_is_asked_for() -> None:
    asked = plan_interventions(
        4, drop="1", swap="0-", repeat="2", ablate_attn="3", ablate_mlp="0", schedules=["3-, 0"]
    )
    assert [(i.kind, i.layer, i.span, i.schedule, i.resumes_at) for i in asked] == [
        ("drop", 1, 1, "0,2-3", 1),
        ("swap", 0, 2, "1,0,2-3", 0),
        ("swap", 1, 2, "0,2,1,3", 1),
        ("swap", 2, 2, "0-1,3,2", 2),
        ("repeat", 0, 2, "0,0-1,1-3", 1),
        ("repeat", 1, 2, "0-1,1-2,2-3", 2),
        ("repeat", 2, 2, "0-2,2-3,3", 3),
        ("ablate_attn", 3, 1, "0-2,3(-attn)", 3),
        ("ablate_mlp", 0, 1, "0(-mlp),1-3", 0),
        ("schedule", None, None, "3,0", 0),
    ]
    assert plan_interventions(4, drop="0,0-1") == plan_interventions(4, drop="0-1", repeat=[])
    (stale, *_) = plan_interventions(3, repeat="1", stale_kv=True)
    assert (stale.schedule, stale.resumes_at) == ("0(stale),1-2", 0)


def test_a_no_op_resumes_where_it_says() -> None:
    assert Intervention("noop", 2, 0, IDENTITY).resumes_at == 2
    assert Intervention("schedule", None, None, IDENTITY).resumes_at == N_LAYERS
    assert Intervention("schedule", None, None, IDENTITY[:3]).resumes_at == 3


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"drop": "4"}, SiteNotFound, "Layers '4' are not all within 0 … 3"),
        ({"ablate_mlp": "x"}, SiteNotFound, "'x' is not a list of layers"),
        ({"schedules": ["0-2,7"]}, SiteNotFound, "Layers '7' are not all within 0 … 3"),
        ({"schedules": ["0,1(-head)"]}, SiteNotFound, r"'1\(-head\)' is not a list of layers"),
        ({"schedules": [" , "]}, PlanError, "it names no layer"),
        ({"swap": "2-3"}, PlanError, "Layer 3 is the last: there is none to swap it with"),
        ({"repeat": "5"}, PlanError, "A block of '5' layers cannot be repeated"),
        ({"repeat": "2,0"}, PlanError, "A block of '0' layers"),
        ({"repeat": "all"}, PlanError, "A block of 'all' layers"),
    ],
)
def test_what_no_model_has(asked: dict[str, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plan_interventions(4, **asked)  # type: ignore[arg-type]
