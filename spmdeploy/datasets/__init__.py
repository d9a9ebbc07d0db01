"""Labeled image folders for training: reading, masks, preparation, checks."""
