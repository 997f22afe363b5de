"""What ``layerlake analyze`` prints."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from layerlake.catalog.run import Run
from layerlake.cli import main


def test_it_prints_the_table_that_it_gives_as_json(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """The main one, though another is shorter: the neurons, not the counts of them."""
    url = make_run().store.url
    main(["analyze", url, "neurons", "--json"])
    rows = json.loads(capsys.readouterr().out)
    main(["analyze", url, "neurons"])
    out, err = capsys.readouterr()
    header, *lines = out.splitlines()
    assert header.split() == [*rows[0]]
    assert len(lines) == len(rows) == 32
    assert "neurons (32 rows), neuron_counts (" in err
