"""A run cut into chunks of few rows, and the same as tables in memory."""

# queries over data of our own

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from tests.conftest import build_run

from layerlake.catalog import layout
from layerlake.catalog.lake import Lake
from layerlake.catalog.run import Run
from layerlake.sql import ReadLog, Session

AXES = {"resid": "boundary", "mlp_post": "layer"}


@dataclass
class World:
    """A run cut into chunks of few rows, and all that is in it as tables in memory."""

    run: Run
    session: Session
    log: ReadLog
    memory: duckdb.DuckDBPyConnection

    def ask(self, text: str, params: Any = None) -> list[tuple[Any, ...]]:
        """Return the rows of a query, once they have turned out right."""
        self.log.reads.clear()
        self.session.restrictions.clear()
        found = sorted(self.session.sql(text, params).fetchall(), key=repr)
        assert found == self.by_memory(text, params), text
        return found

    def by_memory(self, text: str, params: Any = None) -> list[tuple[Any, ...]]:
        return sorted(self.memory.sql(text, params=params).fetchall(), key=repr)

    @property
    def chunks(self) -> set[tuple[str, int | None, int]]:
        """What was read: site, layer, chunk."""
        return {(read.site, read.layer, chunk) for read in self.log.reads for chunk in read.chunks}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_NBYTES", 64)
        run = build_run(
            tmp_path_factory.mktemp("world") / "lake",
            lengths=(5, 9, 3, 12, 7),
            vocab=[f"t{i}" for i in range(20)],
            sites=("resid", "mlp_post", "pattern"),
        )
    assert run.manifest.geometry.chunk_rows == run.manifest.geometry.chunk_rows | {"resid": 2, "mlp_post": 1}
    memory = duckdb.connect()
    memory.execute("CREATE MACRO unit(vec, i) AS vec[i + 1]")
    memory.execute("CREATE MACRO norm(vec) AS sqrt(array_inner_product(vec, vec))")
    for name, table in in_memory(run).items():
        memory.register(f"given_{name}", table)
        memory.execute(f"CREATE TABLE {name} AS FROM given_{name}")
    log = ReadLog()
    return World(run, Session(Lake(run.store.url), log=log), log, memory)


def in_memory(run: Run) -> dict[str, pa.Table]:
    """Read all of a run, without SQL."""
    texts = dict(zip(run.vocab["token_id"].to_pylist(), run.vocab["text"].to_pylist(), strict=True))
    text = [texts.get(token) for token in run.tokens["token_id"].to_pylist()]
    tokens = run.tokens.append_column("text", pa.array(text, pa.string()))
    tables = {"tokens": tokens, "documents": run.stored_documents}
    for site, axis in AXES.items():
        chunk = (run.tokens["row"].to_numpy() // run.manifest.geometry.chunk_rows[site]).astype(np.int32)
        labels = tokens.append_column("chunk", pa.array(chunk))
        layers = []
        for layer in range(run.array(site).shape[0]):
            values = np.concatenate([run.read(site, layer, p) for p in run.manifest.partitions])
            vec = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            place = pa.array(np.full(len(values), layer, dtype=np.int32))
            layers.append(labels.add_column(0, axis, place).append_column("vec", vec))
        tables[site] = pa.concat_tables(layers)
    rows = [
        (layer, head, document, query, key, float(dense[head, query, key]))
        for document in run.stored_documents["document"].to_pylist()
        for layer in range(run.shape.n_layers)
        for dense in [run.attention(document, layer).to_numpy()]
        for head, query, key in np.ndindex(dense.shape)
        if key <= query
    ]
    names = ["layer", "head", "document", "query", "key", "value"]
    types = [pa.int32(), pa.int32(), pa.int64(), pa.int32(), pa.int32(), pa.float32()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)]
    tables["pattern"] = pa.table(dict(zip(names, columns, strict=True)))
    return tables
