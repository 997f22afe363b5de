"""What begins a document, and that its tokens are the model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers

from layerlake.capture.encoder import TextEncoder, resolve_bos
from layerlake.catalog.errors import CorpusError

IDS: dict[str, int | None] = {"bos": 1, "eos": 2, "start": None}


@pytest.mark.parametrize(
    ("special", "choice", "bos"),
    [
        ({}, "auto", 1),
        ({"bos": None}, "auto", 2),
        ({"bos": None, "eos": None}, "auto", None),
        ({}, "none", None),
        ({}, "7", 7),
        ({"bos": 300}, "auto", 2),  # some tokenizers name a token that the model has no embedding for
        ({"bos": 300, "eos": None}, "auto", None),
    ],
)
def test_what_begins_a_text(special: dict[str, int | None], choice: str, bos: int | None) -> None:
    assert resolve_bos(choice, IDS | special, n_vocab=300) == bos


@pytest.mark.parametrize(
    ("start", "choice", "bos"), [(None, "auto", None), (1, "auto", 1), (1, "none", None), (None, "7", 7)]
)
def test_what_begins_a_prompt_is_up_to_its_tokenizer(start: int | None, choice: str, bos: int | None) -> None:
    assert resolve_bos(choice, IDS | {"start": start}, n_vocab=300, of_tokenizer=True) == bos


@pytest.mark.parametrize("choice", ["300", "-1", "BOS", "", "1.5", "²"])
def test_what_cannot_begin_a_document_is_refused(choice: str) -> None:
    with pytest.raises(CorpusError, match="is not a BOS") as caught:
        resolve_bos(choice, IDS, n_vocab=300)
    assert "below 300" in caught.value.hint


def test_bos_stands_in_front_and_the_tokenizer_adds_none_of_its_own(
    tokenizer: transformers.PreTrainedTokenizerFast,
    make_tokenizer: Callable[..., transformers.PreTrainedTokenizerFast],
) -> None:
    from tokenizers.processors import TemplateProcessing

    framing = make_tokenizer(bos_token="<|end|>")  # noqa: S106  # no password
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    bare = tokenizer("a lazy dog", add_special_tokens=False)["input_ids"]
    for each in (tokenizer, framing):
        assert TextEncoder(each, 5, 10, 1, 400).encode("a lazy dog", "x").tolist() == [5, *bare]
        assert TextEncoder(each, None, 1, 1, 400).encode("a lazy dog", "x").tolist() == bare  # uncut


def test_a_tokenizer_of_another_model_is_found_out(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match=r"x#3 has token id .* the tokenizer does not belong to the model"):
        TextEncoder(tokenizer, 0, 10, 1, n_vocab=1).encode("fox", "x#3")
