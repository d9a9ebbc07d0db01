"""Geometry of edits of any size, in numpy, independent of any model.

pieces      what belongs together in the mask
windows     policy: the context windows around the pieces
frames      geometry: a window in the model's square input, and what the network is told there
extension   policy: the steps in which a picture grows beyond its borders
levels      geometry: the sizes through which a cascade carries a window up, and their tiles
blending    how much each of several overlapping tiles counts
seams       how much the borders of tiles show
stitching   edited pixels back into the photo
"""
