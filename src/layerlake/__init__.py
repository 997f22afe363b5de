"""layerlake: a data lake of language-model activations. Capture once, then ask questions without the model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture.execute import capture_run
    from .capture.interventions import InterventionSpec
    from .capture.plan import CapturePlan, plan_capture
    from .capture.spec import CaptureSpec
    from .catalog.errors import LayerLakeError
    from .catalog.findings import Finding
    from .catalog.run import Run
    from .catalog.shapes import ModelShape
    from .catalog.sites import SITES, Site
    from .interventions import intervene
    from .lake import Lake, open_lake

__all__ = [
    "SITES",
    "CapturePlan",
    "CaptureSpec",
    "Finding",
    "InterventionSpec",
    "Lake",
    "LayerLakeError",
    "ModelShape",
    "Run",
    "Site",
    "capture_run",
    "intervene",
    "open_lake",
    "plan_capture",
]

# Names are looked up when they are first used, so that `import layerlake` costs next to nothing and
# needs neither torch nor dask.
_HOMES = {
    "SITES": "catalog.sites",
    "CapturePlan": "capture.plan",
    "CaptureSpec": "capture.spec",
    "Finding": "catalog.findings",
    "InterventionSpec": "capture.interventions",
    "Lake": "lake",
    "LayerLakeError": "catalog.errors",
    "ModelShape": "catalog.shapes",
    "Run": "catalog.run",
    "Site": "catalog.sites",
    "capture_run": "capture.execute",
    "intervene": "interventions",
    "open_lake": "lake",
    "plan_capture": "capture.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerlake' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
