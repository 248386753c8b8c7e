"""Every figure that a run leaves behind, drawn from what the run has saved: see ``record.Record``."""

from typing import TYPE_CHECKING

from adapters.imports import Later

if not TYPE_CHECKING:
    figures = Later("runs.common.pictures.figures")  # it imports matplotlib, which only a run that draws needs
