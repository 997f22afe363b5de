"""What the -ing probes are made of: which tokens count, how examples are chosen and matched, random neurons."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerlake.analyze import ing_examples
from layerlake.analyze.ing_examples import IngTokens, find_examples
from layerlake.analyze.ing_probes import ProbeNeurons, best_threshold
from layerlake.catalog.errors import AnalysisError
from layerlake.catalog.run import Run

Array = npt.NDArray[Any]


def fake_run(ids: list[list[int]], *, bos: int | None = 0) -> Run:
    """As much of a run as examples are found in."""
    table = {
        "token_id": np.concatenate(ids).astype(np.int32),
        "position": np.concatenate([np.arange(len(part)) for part in ids]).astype(np.int32),
        "document": np.repeat(np.arange(len(ids)), [len(part) for part in ids]),
        "row": np.arange(sum(map(len, ids))) + 1000,
    }
    manifest = SimpleNamespace(bos_token_id=bos)
    return cast(Run, SimpleNamespace(run_id="fake", tokens=pa.table(table), manifest=manifest))


def tokens_of(n: int) -> IngTokens:
    """BOS, twelve in -ing, then others; every second one has a leading blank."""
    texts = [" " * (i % 2 == 0) + (f"w{i}ing" if 0 < i <= 12 else f"w{i}") for i in range(n)]
    special = np.arange(n) == 0
    return IngTokens(
        np.array([text.endswith("ing") for text in texts]),
        np.ones(n, dtype=bool),
        special,
        np.array([text.startswith(" ") for text in texts]),
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=6, max_size=30),
    context=st.integers(1, 6),
    bos=st.sampled_from([0, None]),
    most=st.sampled_from([7, 1000]),
    seed=st.integers(0, 3),
)
def test_examples_are_balanced_matched_and_disjoint(
    lengths: list[int], context: int, bos: int | None, most: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 40, n).tolist() for n in lengths]  # BOS in the middle, too, as in packed windows
    run, tokens = fake_run(ids, bos=bos), tokens_of(40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ing_examples, "MIN_EXAMPLES", 1)
        try:
            examples = find_examples(run, tokens, context=context, most=most, seed=seed)
        except AnalysisError:
            assume(False)  # too little text
            raise
        again = find_examples(run, tokens, context=context, most=most, seed=seed)
    assert all(
        (getattr(again, name) == getattr(examples, name)).all() for name in ("rows", "folds", "labels")
    )
    flat = np.concatenate(ids)
    counts = np.bincount(flat)
    places = examples.rows - 1000 + 1
    assert (np.diff(places) > 0).all()
    assert (flat[places] == examples.targets).all()
    assert (tokens.is_ing[flat[places]] == examples.labels).all()
    assert not tokens.is_special[flat[places]].any()
    assert len(examples) <= 2 * most
    starts = np.cumsum([0, *lengths])
    for place, document in zip(places, examples.documents, strict=True):
        before = flat[starts[document] : place]
        assert place < starts[document + 1]
        if bos is not None and (before == bos).any():
            before = before[np.flatnonzero(before == bos)[-1] + 1 :]
        assert len(before) >= context
    assert len({*zip(examples.documents, examples.folds, strict=True)}) == len({*examples.documents})

    def kinds(label: bool) -> Counter[tuple[int, bool, int]]:
        chosen = np.flatnonzero(examples.labels == label)
        targets = examples.targets[chosen]
        bands = [len(bin(counts[target])) for target in targets]
        return Counter(
            zip(examples.folds[chosen].tolist(), tokens.has_blank[targets].tolist(), bands, strict=True)
        )

    assert kinds(True) == kinds(False)


def test_which_tokens_end_in_ing(make_run: Callable[..., Run]) -> None:
    vocab = ["ing", "ing", " RING", "Being ", "ingot", " ing.", "\n\tsing\n", "�ing", "", " "]
    run = make_run(vocab=vocab, token_ids=np.ones(36, dtype=np.int64))
    tokens = IngTokens.open(run)
    assert np.flatnonzero(tokens.is_ing).tolist() == [1, 2, 3, 6, 7]  # 0 is special
    assert np.flatnonzero(tokens.has_blank).tolist() == [2, 5, 9]
    assert tokens.is_known.sum() == len(vocab) < run.shape.n_vocab


def test_gpt2_has_as_many_as_its_published_vocabulary() -> None:
    data = Path(
        os.environ.get("LAYERLAKE_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    )
    folder = data / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(
            "the tokenizer is not here: put it into ../shared/data, or say where with LAYERLAKE_SHARED_DATA"
        )
    pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    texts = [piece.replace("Ġ", " ") for piece in sorted(pieces, key=pieces.__getitem__)]
    special = [text == "<|endoftext|>" for text in texts]
    vocab = pa.table({"token_id": range(50257), "text": texts, "is_special": special})
    fake = SimpleNamespace(run_id="gpt2", vocab=vocab, shape=SimpleNamespace(n_vocab=50257))
    tokens = IngTokens.open(cast(Run, fake))
    assert tokens.is_ing.sum() == 2141
    assert (tokens.is_ing & tokens.has_blank).sum() == 1668


def test_one_long_document_cannot_be_split() -> None:
    ids = np.random.default_rng(0).integers(1, 40, 20_000).tolist()
    with pytest.raises(AnalysisError, match="in 1 documents"):
        find_examples(fake_run([ids]), tokens_of(40), context=24, most=1000, seed=0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: (np.array([float(a) for a, _ in pairs]), np.array([b for _, b in pairs]))
    )
)
def test_no_threshold_is_better_than_the_best(drawn: tuple[Array, Array]) -> None:
    scores, labels = drawn
    threshold = best_threshold(scores, labels)
    candidates = [-np.inf, *(scores.min() + np.arange(-1, 14) / 2)]
    best = max(((scores > cut) == labels).sum() for cut in candidates)
    assert ((scores > threshold) == labels).sum() == best


def test_random_neurons_are_of_the_same_layers_and_none_is_selected() -> None:
    selected = np.array([[3, 1], [0, 2], [3, 7], [3, 0]])
    heavy = np.array([[3, 7], [1, 4], [0, 5]])
    neurons = ProbeNeurons.of(selected, heavy, 10, seed=0)

    def names(places: Array) -> list[tuple[int, int]]:
        return [(int(neurons.layers[i]), int(neurons.units[i])) for i in places]

    assert names(neurons.selected) == [(3, 1), (0, 2), (3, 7), (3, 0)]
    assert names(neurons.heavy) == [(3, 7), (0, 5)]  # those of layer 1 are of no probed layer
    assert [layer for layer, _ in names(neurons.random)] == [3, 0, 3, 3]
    assert set(names(neurons.random)).isdisjoint(names(neurons.selected))
    assert len(set(names(neurons.random))) == 4
