"""Data files of the package: class tables, the built-in model and sample edits."""
