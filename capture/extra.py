"""The packages that come with the extra ``capture``, imported when they are needed, and not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..catalog.errors import MissingExtra

__all__ = ["import_extra"]


def import_extra(package: str) -> Any:
    """Import a package of the extra ``capture``.

    Raises
    ------
    MissingExtra
        It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtra(package.partition(".")[0], "capture") from error
