"""Evaluation: command line, tasks, metrics, records, scores, plots and the reference model."""
