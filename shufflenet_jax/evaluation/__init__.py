"""Evaluation: exact counts, predictions, comparisons and the report."""
