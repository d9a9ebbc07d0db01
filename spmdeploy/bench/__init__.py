"""Measures what an edit costs on this machine with each backend, and how far its results are from PyTorch's.

Everything except `torch_backends`, `seeded_bundles` and what opens them works without torch.
"""
