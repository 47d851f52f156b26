"""Data sets, templates, partitions, rows of tokens and cohorts."""
