"""Every figure that a run leaves behind, drawn from what the run has saved: see ``record.Record``."""
