"""Geometry of edits of any size: windows, letterbox, pyramid, stitching, outpainting and seams; numpy only."""
