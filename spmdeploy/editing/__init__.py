"""Edits of images of any size: options, planning, inference, compositing, reports."""
