"""Metrics and comparisons of trained models."""
