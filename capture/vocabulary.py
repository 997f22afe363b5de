"""The text of every token that a model knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from ..catalog.tables import VOCAB
from .description import ModelDescription

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["vocab_table"]


def vocab_table(description: ModelDescription) -> pa.Table:
    """Return the text of every token id that the tokenizer knows (``tables.VOCAB``).

    The text is that of the id decoded alone; a leading blank is kept, a part of a UTF-8 character shows as �.
    """
    tokenizer = description.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i < description.shape.n_vocab)
    texts = [_token_text(tokenizer, i) for i in ids]
    return pa.table([ids, texts, [i in special for i in ids]], schema=VOCAB)


def _token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Decode one id. SentencePiece drops a leading blank when it decodes alone, so its piece is read instead."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(piece, str) and piece.startswith("▁"):
        return piece.replace("▁", " ")
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
