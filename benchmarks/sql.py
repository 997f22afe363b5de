"""SQL over vectors against numpy over the same array, and against SQL with one row a scalar, as ratios in one process.

A run of 200 thousand tokens × 13 boundaries × 768 in float16 (4 GB), of a random model with small MLPs:

mean norm
    at every boundary, against a loop in numpy over the same Zarr array;
look-up
    of the vectors of 100 random tokens at one boundary, warm;
text
    the chunks that a predicate on the token's text reads, of those that hold a match;
xarray-sql
    the first two at one boundary, and the mean of one unit, against xarray-sql (one row a scalar) on the same array,
    if it is installed (``pip install xarray-sql``).

``python benchmarks/sql.py`` (about four minutes and 5 GB on two cores); ``--smoke`` takes a tiny run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, GPT2Config

from capture import measure, random_model
from layerlake import CaptureSpec, Run, capture_run
from layerlake.demo.corpus import iter_documents
from layerlake.demo.tour import demo_model_path
from layerlake.lake import Lake, open_lake

BOUNDARY = 6
UNIT = 5
TEXT = " yield"


def make_run(folder: Path, *, smoke: bool, n_tokens: int) -> Run:
    """Capture the residual stream of a random model; its MLPs are small, for nobody looks at them."""
    size = {"n_embd": 64, "n_head": 4} if smoke else {}
    config = GPT2Config(n_inner=16, vocab_size=4096, bos_token_id=0, eos_token_id=0, **size)
    dataset = folder / "text.jsonl"
    with dataset.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for _, text in iter_documents(held_out=False))
    spec = CaptureSpec(
        model=random_model(config), tokenizer=AutoTokenizer.from_pretrained(demo_model_path("stdlib-gpt2")),
        dataset=str(dataset), sites="resid", context=512, max_tokens=n_tokens,
    )  # fmt: skip
    return capture_run(folder / "lake", spec)


def norms_by_numpy(run: Run) -> list[float]:
    """Return the mean norm at each boundary, partition by partition."""
    array, used, means = run.array("resid"), run.tokens["row"].to_numpy(), []
    for boundary in range(run.shape.n_layers + 1):
        total = 0.0
        for partition in run.manifest.partitions:
            start, stop = run.span("resid", partition)
            rows = used[(used >= start) & (used < stop)] - start
            stored = np.asarray(array[boundary, start:stop])
            values = (stored if len(rows) == len(stored) else stored[rows]).astype(np.float32)
            total += float(np.sqrt(np.vecdot(values, values)).sum(dtype=np.float64))
        means.append(total / len(used))
    return means


def scalars(run: Run) -> Callable[[str], Any] | None:
    """Return xarray-sql over the residual stream at one boundary; None where it is not installed."""
    if importlib.util.find_spec("xarray_sql") is None:
        return None
    resid = run.resid.isel(boundary=[BOUNDARY])
    rows = resid["row"].to_numpy()
    values = resid.drop_vars([name for name in resid.coords if name not in resid.dims]).astype("float32")
    labelled = values.assign_coords(token=rows, d_model=np.arange(run.shape.d_model), boundary=[BOUNDARY])
    context = importlib.import_module("xarray_sql").Context()
    chunks = {"boundary": 1, "token": run.manifest.geometry.chunk_rows["resid"], "d_model": run.shape.d_model}
    context.from_dataset("resid", labelled.rename("value").to_dataset(), chunks=chunks)
    return lambda query: context.sql(query).to_pandas()


def chunks_of_text(lake: Lake) -> tuple[int, int]:
    """Return the chunks that a predicate on the text reads, and those that hold a token with that text."""
    said = lake.explain(
        f"SELECT avg(unit(vec, {UNIT})) FROM resid WHERE boundary = {BOUNDARY} AND text = '{TEXT}'"
    )
    query = "SELECT count(DISTINCT chunk) FROM resid WHERE boundary = ? AND text = ?"
    ((n_needed,),) = lake.sql(query, [BOUNDARY, TEXT]).fetchall()
    return said.n_chunks, n_needed


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, once")
    options = parser.parse_args()
    n_tokens, repeats = (3000, 1) if options.smoke else (options.tokens, options.repeats)
    folder = Path(tempfile.mkdtemp())
    run = make_run(folder, smoke=options.smoke, n_tokens=n_tokens)
    lake = open_lake(folder / "lake")
    drawn = np.random.default_rng(0).choice(run.tokens["row"].to_numpy(), 100, replace=False)
    some = ", ".join(map(str, sorted(drawn.tolist())))

    def norms() -> list[float]:
        query = "SELECT avg(norm(vec)) FROM resid GROUP BY boundary ORDER BY boundary"
        return [mean for (mean,) in lake.sql(query).fetchall()]

    ours: dict[str, Callable[[], Any]] = {
        "mean norm at one boundary": lambda: lake.sql(
            f"SELECT avg(norm(vec)) FROM resid WHERE boundary = {BOUNDARY}"
        ).fetchall(),
        "vectors of 100 tokens": lambda: lake.sql(
            f"SELECT row, vec FROM resid WHERE boundary = {BOUNDARY} AND row IN ({some})"
        ).to_arrow_table(),
        "mean of one unit": lambda: lake.sql(
            f"SELECT avg(unit(vec, {UNIT})) FROM resid WHERE boundary = {BOUNDARY}"
        ).fetchall(),
    }
    theirs = {
        "mean norm at one boundary": "SELECT avg(norm) FROM "
        "(SELECT sqrt(sum(value * value)) AS norm FROM resid GROUP BY token)",
        "vectors of 100 tokens": f"SELECT token, d_model, value FROM resid WHERE token IN ({some})",
        "mean of one unit": f"SELECT avg(value) FROM resid WHERE d_model = {UNIT}",
    }
    contestants: dict[str, Callable[[], Any]] = {
        "mean norm, numpy": lambda: norms_by_numpy(run),
        "mean norm": norms,
        **ours,
    }
    one_row_a_scalar = scalars(run)
    if one_row_a_scalar is not None:
        for name, query in theirs.items():
            contestants[f"{name}, xarray-sql"] = lambda query=query: one_row_a_scalar(query)
            if len(found := one_row_a_scalar(query)) == 1:
                np.testing.assert_allclose(found.iloc[0, 0], ours[name]()[0][0], rtol=1e-3)
    np.testing.assert_allclose(norms(), norms_by_numpy(run), rtol=1e-5)
    seconds = measure({name: lambda _, ask=ask: ask() for name, ask in contestants.items()}, repeats)
    n_read, n_needed = chunks_of_text(lake)
    n_chunks = lake.explain("SELECT avg(norm(vec)) FROM resid").n_chunks
    shutil.rmtree(folder)

    print(f"{run.n_tokens} tokens × {run.shape.n_layers + 1} boundaries × {run.shape.d_model}, {n_chunks} chunks, "
          f"{os.cpu_count()} cores\n")  # fmt: skip
    print("| contestant | seconds |\n|---|--:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| ratio | measured |\n|---|--:|")
    print(f"| mean norm, speed against numpy's | {seconds['mean norm, numpy'] / seconds['mean norm']:.2f} |")
    print(f"| chunks read for a text, of those that hold it ({n_needed}) | {n_read / n_needed:.2f} |")
    for name in theirs if one_row_a_scalar is not None else ():
        print(f"| {name}, xarray-sql against this | {seconds[f'{name}, xarray-sql'] / seconds[name]:.1f} |")
    if one_row_a_scalar is None:
        print("\nxarray-sql is not installed: pip install xarray-sql")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
