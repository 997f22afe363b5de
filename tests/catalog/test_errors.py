"""Every error is a LayerLakeError and the built-in it resembles."""

from __future__ import annotations

import pytest

from layerlake.catalog import errors
from layerlake.catalog.errors import LayerLakeError, MissingExtra, SelfCheckFailed, did_you_mean

BUILT_IN = {
    "AdapterMismatch": AssertionError,
    "AmbiguousRun": LookupError,
    "AnalysisError": ValueError,
    "CaptureInProgress": RuntimeError,
    "CaptureUnfinished": RuntimeError,
    "CorpusError": ValueError,
    "CorruptRun": ValueError,
    "DamagedLake": ValueError,
    "FormatError": ValueError,
    "LakeNotFound": FileNotFoundError,
    "MissingExtra": ImportError,
    "ModelError": ValueError,
    "OverflowInCapture": OverflowError,
    "PlanError": ValueError,
    "QueryError": ValueError,
    "RunNotFound": LookupError,
    "SelfCheckFailed": AssertionError,
    "SiteNotFound": LookupError,
    "StoreError": OSError,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_also_the_built_in_it_resembles(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, LayerLakeError)
    assert issubclass(kind, BUILT_IN[name])
    error = kind("a", "b") if kind is MissingExtra else kind("what happened", hint="the mend")
    assert "a" in str(error)
    assert error.hint


def test_every_public_error_is_in_the_table_above() -> None:
    named = {name for name in errors.__all__ if name[0].isupper()}
    assert named == {*BUILT_IN, "LayerLakeError", "NotInLake"}


def test_a_wrong_adapter_is_a_failed_self_check() -> None:
    assert issubclass(errors.AdapterMismatch, SelfCheckFailed)
    assert issubclass(errors.ModelError, errors.PlanError)
    assert issubclass(errors.CorpusError, errors.PlanError)


def test_a_missing_extra_says_what_to_install() -> None:
    error = MissingExtra("torch", "capture")
    assert 'pip install "layerlake[capture]"' in error.hint


def test_did_you_mean_names_the_nearest_word_or_nothing() -> None:
    assert did_you_mean("atn_out", ["attn_out", "mlp_out"]) == " Did you mean 'attn_out'?"
    assert did_you_mean("xyz", ["attn_out", "mlp_out"]) == ""
    assert did_you_mean("xyz", []) == ""
