"""The rows of a dataset, of the hub or of a local file, in an order that can be had again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..catalog.errors import CorpusError, MissingExtra
from .digests import file_digest
from .extra import import_extra

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["Rows", "open_rows", "shuffled"]

T = TypeVar("T")

_FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_SAMPLE_BY = {"paragraph": "paragraph", "line": "line", "file": "document"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that can be read again and are the same. Nothing is opened before it is read."""

    description: str
    """For people: the hub id or the file's name."""
    fingerprint: Mapping[str, Any]
    """What decides which rows there are, in which order; part of the run's identity."""
    open_dataset: Callable[[], IterableDataset] = field(repr=False)
    """Opens the dataset that the rows are of."""
    shuffle_buffer: int = 0
    seed: int = 0

    @cached_property
    def _dataset(self) -> Any:
        return self.open_dataset()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; reads the first row where the format does not tell.

        Raises
        ------
        CorpusError
            The rows cannot be read, or there are none.
        """
        try:
            names = self._dataset.column_names or list(next(iter(self._dataset), {}))
        except CorpusError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        if not names:
            raise CorpusError(f"The dataset '{self.description}' is empty.")
        return tuple(names)

    def read(self, columns: Sequence[str], skip: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield ``(number of the row in the dataset, its columns)`` in order, leaving out the first ``skip``.

        A column that a row does not have is None. Rows that are left out are read all the same; no more than
        ``shuffle_buffer`` are held.

        Raises
        ------
        CorpusError
            A row cannot be read.
        """
        if self.shuffle_buffer > 1:
            return islice(shuffled(self._read(columns, 0), self.shuffle_buffer, self.seed), skip, None)
        return self._read(columns, skip)

    def _read(self, columns: Sequence[str], skip: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read in the dataset's own order; what goes wrong at whichever row is an error of the corpus."""
        rows = iter(self._dataset.skip(skip))
        number = skip
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield number, {name: row.get(name) for name in columns}
            number += 1

    def _unreadable(self, error: Exception) -> CorpusError:
        return CorpusError(f"The dataset '{self.description}' cannot be read: {error}")


def shuffled(items: Iterable[T], buffer: int, seed: int) -> Iterator[T]:
    """Yield items in an order drawn from ``seed``, holding at most ``buffer`` of them.

    Each comes at the earliest ``buffer`` - 1 places before its own. Written out here, and with
    ``random.Random.random``, whose sequence Python keeps, because the order is part of a run's identity:
    the shuffles of ``datasets`` and of numpy may change with their versions.

    Examples
    --------
    >>> list(shuffled(range(8), buffer=3, seed=0))
    [2, 3, 1, 0, 5, 7, 4, 6]
    """
    chance = random.Random(seed).random  # noqa: S311  # nothing secret
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = int(chance() * buffer)
        yield held[place]
        held[place] = item
    while held:
        place = int(chance() * len(held))
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()


def open_rows(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    sample_by: str = "paragraph",
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> Rows:
    """Find the rows of a dataset of the hub, or of a local txt, jsonl, parquet or arrow file.

    Digests a local file, resolves the revision of a hub dataset; opens neither.

    Parameters
    ----------
    dataset : str
        The path or the hub id.
    config, split, revision : str, optional
        Of a hub dataset; the split is ``train`` if None.
    sample_by : {'paragraph', 'line', 'file'}
        What is a row of a txt file.
    shuffle_buffer : int
        How many rows :func:`shuffled` holds; 0 and 1 leave the order as it is.
    seed : int
        Of the shuffle.

    Raises
    ------
    CorpusError
        The path does not exist, its format is not known, it is empty, a local file was given a split, or (hub)
        its revision cannot be resolved: what cannot be fingerprinted is refused.
    """
    order = {"shuffle_buffer": shuffle_buffer, "seed": seed} if shuffle_buffer > 1 else {}
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise CorpusError(
            f"'{dataset}' is a folder.", hint="Name one file in it, or the id of a dataset on the hub."
        )
    if path.exists():
        kind = _require_format(path, sample_by)
        for option, value in (("split", split), ("dataset-config", config), ("dataset-revision", revision)):
            if value is not None:
                raise CorpusError(
                    f"'{dataset}' is a file and has no {option} '{value}'.", hint=f"Leave --{option} out."
                )
        if kind != "text" and sample_by != "paragraph":
            raise CorpusError(
                f"'{dataset}' has rows, and cannot be split by {sample_by}.", hint="Leave --sample-by out."
            )
        unit = {"sample_by": sample_by} if kind == "text" else {}
        fingerprint = {"sha256": file_digest(path), **unit, **order}
        return Rows(path.name, fingerprint, lambda: _open_file(path, kind, sample_by), **order)
    if path.suffix.lower() in _FORMATS or dataset.startswith(("/", ".", "~")):
        raise CorpusError(f"The dataset file '{dataset}' does not exist.")
    split = split or "train"
    commit = _resolve_revision(dataset, revision)
    fingerprint = {"hub": dataset, "revision": commit, "config": config, "split": split, **order}
    return Rows(dataset, fingerprint, lambda: _open_hub(dataset, config, split, commit), **order)


def _require_format(path: Path, sample_by: str) -> str:
    """Return the kind of a dataset file; raise CorpusError for one that layerlake does not read."""
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise CorpusError(
            f"'{path}' is not a dataset file that layerlake reads.", hint=f"Formats: {', '.join(_FORMATS)}."
        )
    if path.stat().st_size == 0:
        raise CorpusError(f"The dataset '{path}' is empty.")
    if kind == "text" and sample_by not in _SAMPLE_BY:
        raise CorpusError(
            f"A text cannot be split by '{sample_by}'.", hint="--sample-by paragraph, line or file."
        )
    return kind


def _open_file(path: Path, kind: str, sample_by: str) -> IterableDataset:
    options = {"sample_by": _SAMPLE_BY[sample_by]} if kind == "text" else {}
    try:
        # By its builder, because load_dataset tells the hub of every file that it opens, local ones included.
        builder = import_extra(f"datasets.packaged_modules.{kind}.{kind}")
        opened = getattr(builder, kind.capitalize())(data_files=str(path), **options)
        return opened.as_streaming_dataset(split="train")
    except MissingExtra:
        raise
    except Exception as error:
        raise CorpusError(f"The dataset '{path}' cannot be read as {kind}: {error}") from error


def _resolve_revision(dataset: str, revision: str | None) -> str:
    """Return the commit that a branch or tag of a hub dataset stands for."""
    hub = import_extra("huggingface_hub")
    try:
        commit: str | None = hub.HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as error:
        raise _not_on_the_hub(dataset, error) from error
    if commit is None:
        raise CorpusError(
            f"The hub does not say which commit of '{dataset}' there is, so it cannot be told apart."
        )
    return commit


def _open_hub(dataset: str, config: str | None, split: str, revision: str | None) -> IterableDataset:
    datasets = import_extra("datasets")
    try:
        return datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
    except Exception as error:
        raise _not_on_the_hub(dataset, error) from error


def _not_on_the_hub(dataset: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"The dataset '{dataset}' is neither a local file nor can it be opened from the hub: "
        f"{(str(error) or type(error).__name__).splitlines()[0]}",
        hint="Give a local txt, jsonl, parquet or arrow file, or the id of a dataset (--dataset-config, --split).",
    )
