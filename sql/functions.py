"""The functions of a run's schema: what is asked of its model, its tokens and the directions saved for it.

They stand where the run's relations stand, and are found in the same way: bare for the run on the search path,
``"run-id".lens_top(…)`` for any. Each is an SQL macro; behind it is a Python function that is given a few thousand
rows at a time.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cached_property, wraps
from weakref import WeakSet

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType

from ..catalog.errors import LayerLakeError, QueryError, did_you_mean
from ..catalog.readout import Readout
from ..catalog.run import Run
from .directions import read_directions
from .reads import ReadLog
from .syntax import quoted
from .top_tokens import TOP_TOKENS, top_tokens

__all__ = ["RUN_FUNCTIONS", "add_functions"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

RUN_FUNCTIONS = ("project", "lens_top", "lens_logit", "top_tokens", "context")
"""Their names."""

_LENS_TOP = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("text", pa.string()),  # NULL for an id without one (the padding of an unembedding)
            ("logit", pa.float32()),
            ("probability", pa.float32()),
        ]
    )
)
_TOP_TOKENS = pa.list_(pa.struct(list(TOP_TOKENS)))
_COLUMNS = 1024  # of the vocabulary at a time: a block of 2048 tokens is 8 MiB

_MACROS = """
CREATE MACRO {schema}.project(vec, direction) AS {project}(vec::FLOAT[], direction);
CREATE MACRO {schema}.lens_top(vec, k := 10) AS {lens_top}(vec::FLOAT[], k::INTEGER);
CREATE MACRO {schema}.lens_logit(vec, token) AS
    {lens_logit}(vec::FLOAT[], token::VARCHAR, typeof(token) = 'VARCHAR');
CREATE MACRO {schema}.context("row", before := 8, after := 8) AS
    {context}("row"::BIGINT, before::INTEGER, after::INTEGER);
CREATE MACRO {schema}.top_tokens(site, layer, unit, k := 10) AS TABLE
    SELECT unnest({top_tokens}(site, layer::INTEGER, unit::INTEGER, k::INTEGER), recursive := true);
"""


def add_functions(connection: duckdb.DuckDBPyConnection, run: Run, log: ReadLog | None = None) -> None:
    """Create a run's functions in its schema, which exists. Nothing is read before one of them is called.

    =================================  =========================================================================
    function                           is
    =================================  =========================================================================
    ``project(vec, direction)``        the dot product with a direction as it is stored, by its name
    ``lens_top(vec, k := 10)``         what the model would say next if it ended here (the logit lens): a list of
                                       (token_id, text, logit, probability), the likeliest first
    ``lens_logit(vec, token)``         the logit of one token there, by its text or its id
    ``context(row, before, after)``    the text around a token, which is marked: ``if x «is» not``
    ``top_tokens(site, layer, unit,    a table: the k tokens at which a unit has its largest values
    k := 10)``                         (:func:`layerlake.sql.top_tokens.top_tokens`)
    =================================  =========================================================================

    The lens is the model's own last step, biases included: x is divided by its own scale, not by the last boundary's.
    A vector that is not finite has none (NULL). From the first call on, the unembedding is held in memory.

    Examples
    --------
    >>> lake = getfixture("example")  # 'def first(names):…', in a model of the demo's
    >>> lake.sql("SELECT context(8, 1, 1), context(0, after := 3)").fetchall()
    [(' for« name» in', '«<|endoftext|>»def first(')]
    >>> guess = "unnest(lens_top(vec, 2), recursive := true)"
    >>> at = "WHERE boundary = 8 AND row = 8"
    >>> lake.sql(f"SELECT text, probability > 0.5 FROM (SELECT {guess} FROM resid {at})").fetchall()
    [(' in', True), (',', False)]
    >>> logits = "lens_logit(vec, ' in') > 13, lens_logit(vec, 311) > 13"  # by text, by id
    >>> lake.sql(f"SELECT {logits} FROM resid {at}").fetchall()
    [(True, True)]
    >>> lake.sql("SELECT row, text, value > 1.5 FROM top_tokens('mlp_post', 7, 3, k := 2)").fetchall()
    [(7, ' for', True), (13, ' return', True)]
    >>> lake.save_direction("unit-5", [float(i == 5) for i in range(128)], site="resid", replace=True)
    >>> lake.sql(f"SELECT project(vec, 'unit-5') = unit(vec, 5) FROM resid {at}").fetchall()
    [(True,)]
    """
    functions = _Functions(run, log)
    names = {}
    for function, parameters, returns in (
        (functions.project, ("FLOAT[]", "VARCHAR"), pa.float32()),
        (functions.lens_top, ("FLOAT[]", "INTEGER"), _LENS_TOP),
        (functions.lens_logit, ("FLOAT[]", "VARCHAR", "BOOLEAN"), pa.float32()),
        (functions.context, ("BIGINT", "INTEGER", "INTEGER"), pa.string()),
        (functions.top_tokens, ("VARCHAR", "INTEGER", "INTEGER", "INTEGER"), _TOP_TOKENS),
    ):
        name = f"{function.__name__} of {run.run_id}"
        connection.create_function(
            name,
            _called(function, returns),
            list(parameters),
            _sql_type(returns),
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,  # with the default, they may not answer NULL
            side_effects=function == functions.top_tokens,  # else it would read the lake to plan the query
        )
        names[function.__name__] = quoted(name)
    connection.execute(_MACROS.format(schema=quoted(run.run_id), **names))
    _WITH_FUNCTIONS.add(connection)


class _Functions:
    """What the macros call: columns in, a column out. A row with a NULL among its arguments is NULL, unasked."""

    def __init__(self, run: Run, log: ReadLog | None) -> None:
        self.run = run
        self.log = log

    def project(self, vectors: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Array:
        x = _matrix(vectors)
        projections, asked = np.empty(len(x), dtype=np.float32), names.to_pylist()
        for name in dict.fromkeys(asked):
            direction, here = self._direction(name), [each == name for each in asked]
            if len(direction) != x.shape[1]:
                raise QueryError(
                    f"The direction '{name}' is of {len(direction)} numbers, this vector of {x.shape[1]}."
                )
            projections[here] = x[here] @ direction
        return pa.array(projections)

    def lens_top(self, vectors: pa.ChunkedArray, counts: pa.ChunkedArray) -> pa.Array:
        wanted = counts.to_numpy()
        if wanted.min() < 1:
            raise QueryError(f"The top {wanted.min()} tokens are none.", hint="k is at least 1.")
        x = self._vectors("lens_top", vectors)
        ids, logits, log_mass = _top_logits(self._normed(x), self._readout.unembed, int(wanted.max()))
        probabilities = np.exp(logits - log_mass[:, None])
        finite = np.asarray(np.isfinite(x).all(axis=1))
        return pa.array(
            [
                [
                    {
                        "token_id": token,
                        "text": self._texts[token],
                        "logit": logit,
                        "probability": probability,
                    }
                    for token, logit, probability in zip(
                        ids[i, :k], logits[i, :k], probabilities[i, :k], strict=True
                    )
                ]
                if finite[i]
                else None
                for i, k in enumerate(wanted)
            ],
            _LENS_TOP,
        )

    def lens_logit(
        self, vectors: pa.ChunkedArray, tokens: pa.ChunkedArray, are_texts: pa.ChunkedArray
    ) -> pa.Array:
        x = self._vectors("lens_logit", vectors)
        asked = list(zip(tokens.to_pylist(), are_texts.to_pylist(), strict=True))
        ids = {each: self._token_id(*each) for each in set(asked)}
        columns = self._readout.unembed[:, [ids[each] for each in asked]].T
        logits = np.vecdot(self._normed(x), columns)
        return pa.array(logits, pa.float32(), mask=~np.isfinite(x).all(axis=1))

    def context(self, rows: pa.ChunkedArray, before: pa.ChunkedArray, after: pa.ChunkedArray) -> pa.Array:
        around = zip(rows.to_numpy(), before.to_numpy(), after.to_numpy(), strict=True)
        return pa.array([self._around(*each) for each in around], pa.string())

    def top_tokens(
        self, sites: pa.ChunkedArray, layers: pa.ChunkedArray, units: pa.ChunkedArray, counts: pa.ChunkedArray
    ) -> pa.Array:
        columns = (column.to_pylist() for column in (sites, layers, units, counts))
        found = [top_tokens(self.run, *call, log=self.log).to_pylist() for call in zip(*columns, strict=True)]
        return pa.array(found, _TOP_TOKENS)

    # -- directions ---------------------------------------------------------------------------------

    @cached_property
    def _directions(self) -> dict[str, Floats]:
        rows = read_directions(self.run.store).to_pylist()
        return {
            row["name"]: np.array(row["vec"], dtype=np.float32)
            for row in rows
            if row["model_id"] == self.run.manifest.model_id
        }

    def _direction(self, name: str) -> Floats:
        if name not in self._directions:
            near = did_you_mean(name, self._directions)
            raise QueryError(
                f"The model of {self.run.run_id} has no direction '{name}'.{near}",
                hint="FROM directions has them all.",
            )
        return self._directions[name]

    # -- the readout --------------------------------------------------------------------------------

    @cached_property
    def _readout(self) -> Readout:
        return Readout.open(self.run)

    def _normed(self, x: Floats) -> Floats:
        return self._readout.normed(np.where(np.isfinite(x), x, 0))

    def _vectors(self, function: str, column: pa.ChunkedArray) -> Floats:
        """Return residual streams as ``[row, d_model]``."""
        x, d_model = _matrix(column), self.run.shape.d_model
        if x.shape[1] != d_model:
            raise QueryError(
                f"{function} reads residual streams of {self.run.run_id}, vectors of {d_model}; "
                f"this one has {x.shape[1]}."
            )
        return x

    def _token_id(self, token: str, is_text: bool) -> int:
        n_vocab = self.run.shape.n_vocab
        if not is_text:
            if not (token.isdecimal() and int(token) < n_vocab):
                raise QueryError(f"There is no token {token}.", hint=f"Ids are 0 … {n_vocab - 1}.")
            return int(token)
        found = [i for i, text in enumerate(self._texts) if text == token]
        if len(found) != 1:
            some = f" ({', '.join(map(str, found[:8]))})" if found else ""
            raise QueryError(
                f"{len(found) or 'No'} tokens of the vocabulary are written '{token}'{some}.",
                hint="Give the id; FROM vocab has them."
                if found
                else "Most words begin with a space, as ' the'.",
            )
        return found[0]

    # -- the text -----------------------------------------------------------------------------------

    @cached_property
    def _texts(self) -> list[str | None]:
        """The text of each token id."""
        texts: list[str | None] = [None] * self.run.shape.n_vocab
        for token, text in zip(
            *(self.run.vocab[name].to_pylist() for name in ("token_id", "text")), strict=True
        ):
            texts[token] = text
        return texts

    @cached_property
    def _tokens(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Rows, ids and positions of the tokens in stored order, and where each document begins there."""
        row, token, position = (self.run.tokens[name].to_numpy() for name in ("row", "token_id", "position"))
        return row, token, position, np.append(np.flatnonzero(position == 0), len(row))

    def _around(self, row: int, before: int, after: int) -> str | None:
        if before < 0 or after < 0:
            raise QueryError(f"There is no context of {min(before, after)} tokens.")
        rows, tokens, positions, starts = self._tokens
        at = int(np.searchsorted(rows, row))
        if at == len(rows) or rows[at] != row:
            return None
        first = at - min(before, positions[at])
        stop = min(at + 1 + after, starts[np.searchsorted(starts, at, side="right")])
        texts = [self._texts[token] or "" for token in tokens[first:stop]]
        texts[at - first] = f"«{texts[at - first]}»"
        return "".join(texts)


def _matrix(column: pa.ChunkedArray) -> Floats:
    """Return vectors of one width as ``[row, width]``; a NULL among the numbers is NaN."""
    lists = column.combine_chunks()
    widths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(widths) > 1:
        raise QueryError(f"Vectors of {widths[0]} and of {widths[1]} numbers do not go together.")
    values: Floats = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), widths[0])


def _top_logits(x: Floats, unembed: Floats, k: int) -> tuple[Ints, Floats, Floats]:
    """Return the k largest of ``x @ unembed``, the largest first, without holding all of it.

    Returns
    -------
    ids, logits : int64 and float32 ``[row, k]``
        Of equal logits the one with the smaller id comes first.
    log_mass : float32 ``[row]``
        ln Σ e^logit, of all.
    """
    n, n_vocab = len(x), unembed.shape[1]
    k = min(k, n_vocab)
    ids = np.zeros((n, k), dtype=np.int64)
    logits = np.full((n, k), -np.inf, dtype=np.float32)
    log_mass = np.full(n, -np.inf, dtype=np.float32)
    for start in range(0, n_vocab, _COLUMNS):
        block = x @ unembed[:, start : start + _COLUMNS]
        highest = block.max(axis=1)
        mass = np.exp(block - highest[:, None]).sum(axis=1)
        log_mass = np.logaddexp(log_mass, highest + np.log(mass))
        better = np.flatnonzero(highest > logits.min(axis=1))  # few, after the first blocks
        head = np.argpartition(-block[better], min(k, block.shape[1]) - 1, axis=1)[:, :k]
        both = np.hstack([logits[better], np.take_along_axis(block[better], head, axis=1)])
        their_ids = np.hstack([ids[better], start + head])
        kept = np.lexsort((their_ids, -both), axis=1)[:, :k]
        logits[better] = np.take_along_axis(both, kept, axis=1)
        ids[better] = np.take_along_axis(their_ids, kept, axis=1)
    return ids, logits, log_mass


def _called(function: Callable[..., pa.Array], returns: pa.DataType) -> Callable[..., pa.Array]:
    """Wrap a function for DuckDB: it is given the rows without a NULL, and the others are NULL.

    Its errors carry their hint in the message, which is all that DuckDB keeps of them.
    """

    @wraps(function)
    def called(*columns: pa.ChunkedArray) -> pa.Array:
        is_given = np.logical_and.reduce([column.is_valid().to_numpy() for column in columns])
        if not is_given.any():
            return pa.nulls(len(is_given), returns)
        try:
            found = function(*(column.filter(pa.array(is_given)) for column in columns))
        except LayerLakeError as error:
            raise QueryError(f"{error} {error.hint}".strip()) from error
        return found.take(pa.array(np.cumsum(is_given) - 1, mask=~is_given))

    return called


def _sql_type(kind: pa.DataType) -> str:
    """Return DuckDB's name of a type."""
    if pa.types.is_list(kind):
        row = kind.value_type
        fields = [row.field(i) for i in range(row.num_fields)]
        return f"STRUCT({', '.join(f'{quoted(each.name)} {_sql_type(each.type)}' for each in fields)})[]"
    return {"int32": "INTEGER", "int64": "BIGINT", "float": "FLOAT", "string": "VARCHAR"}[str(kind)]


_WITH_FUNCTIONS: WeakSet[duckdb.DuckDBPyConnection] = WeakSet()


@atexit.register
def _close() -> None:
    """Close what is still open when Python ends: DuckDB would complain of functions that outlive it."""
    for connection in list(_WITH_FUNCTIONS):
        connection.close()
