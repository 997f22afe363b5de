"""Analyze turns what a lake holds into findings, charts and a report, on CPUs and without the model."""
