"""From WiC files to probes: the states that are probed are those of the word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from layerlake import CaptureSpec, capture_run, open_lake
from layerlake.analyze.wic_items import choose_items
from layerlake.demo.tour import demo_model_path

WORDS = ("import", "iterators", "class", "module", "file", "exceptions")


def write_items(path: Path, n: int) -> None:
    """As WiC 1.0 has them: the words counted between blanks."""
    rows = [
        {
            "word": WORDS[i % 6],
            "idx1": 1,
            "sentence1": f"the {WORDS[i % 6]} {i}",
            "idx2": 3,
            "sentence2": f"we return an {WORDS[i % 6]}",
            "label": i % 7 < 3,
        }
        for i in range(n)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_a_captured_task_is_probed_at_its_words(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "val")}
    for path in files.values():
        write_items(path, 60)
    spec = CaptureSpec(
        model=str(demo_model_path("stdlib-gpt2")),
        task="wic",
        split=",".join(f"{name}={path}" for name, path in files.items()),
        sites="resid",
        dtype="float32",
    )
    run = capture_run(tmp_path / "lake", spec)
    token_of = dict(zip(run.tokens["row"].to_pylist(), run.tokens["token_id"].to_pylist(), strict=True))
    text_of = dict(zip(run.vocab["token_id"].to_pylist(), run.vocab["text"].to_pylist(), strict=True))
    poolings: tuple[Literal["last", "mean"], ...] = ("mean", "last")
    for pooling in poolings:
        items = choose_items(run, "train", "auto", pooling=pooling)
        assert (items.n_train, len(items.labels), items.n_left_out, items.dev_split) == (60, 120, 0, "val")
        for word, spans in zip(items.words, items.spans, strict=True):
            for start, end in spans:
                text = "".join(text_of[token_of[row]] for row in range(start, end)).strip()
                assert text == word if pooling == "mean" else word.endswith(text)
        assert {len(range(*span)) for spans in items.spans for span in spans} > {1} or pooling == "last"

    finding = open_lake(tmp_path / "lake").analyze("wic", seeds=1)
    layers = finding.tables["wic_summary"]["layer"].to_pylist()
    assert sorted(set(layers)) == list(range(-1, run.shape.n_layers))
    assert finding.table["accuracy"].null_count == 0
    view = open_lake(tmp_path / "lake").sql("SELECT DISTINCT features FROM wic ORDER BY 1").fetchall()
    assert [name for (name,) in view] == ["concat", "concat_difference", "cosine", "interaction"]
