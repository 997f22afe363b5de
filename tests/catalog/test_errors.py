"""Every error is a LayerLakeError and the built-in it resembles."""

from __future__ import annotations

import pickle

import pytest

from layerlake.catalog import errors
from layerlake.catalog.errors import (
    CorruptRun,
    LakeNotFound,
    LayerLakeError,
    MissingExtra,
    SelfCheckFailed,
    StoreError,
    decoding,
    did_you_mean,
)

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
    named = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert named == {*BUILT_IN, "LayerLakeError", "NotInLake"}


def test_a_wrong_adapter_is_a_failed_self_check() -> None:
    assert issubclass(errors.AdapterMismatch, SelfCheckFailed)
    assert issubclass(errors.ModelError, errors.PlanError)
    assert issubclass(errors.CorpusError, errors.PlanError)


def test_a_missing_extra_says_what_to_install() -> None:
    error = MissingExtra("torch", "capture")
    assert 'pip install "layerlake[capture]"' in error.hint


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_comes_whole_out_of_another_process(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("a", "b") if kind is MissingExtra else kind("what happened", hint="the mend")
    found = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert (type(found), str(found), found.hint) == (kind, str(error), error.hint)


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("thrift"), KeyError("k"), AttributeError("a"), MemoryError()]
)
def test_what_damaged_bytes_raise_is_a_damage_that_names_the_object(error: Exception) -> None:
    with pytest.raises(CorruptRun, match="an/object"), decoding("an/object"):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), LakeNotFound("x"), StoreError("x"), KeyboardInterrupt()]
)
def test_what_is_no_damage_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, decoding("an/object"):
        raise error
    assert caught.value is error


def test_did_you_mean_names_the_nearest_word_or_nothing() -> None:
    assert did_you_mean("atn_out", ["attn_out", "mlp_out"]) == " Did you mean 'attn_out'?"
    assert did_you_mean("xyz", ["attn_out", "mlp_out"]) == ""
    assert did_you_mean("xyz", []) == ""
