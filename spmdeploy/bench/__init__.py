"""Measuring: what an edit costs on this machine in each backend, beside how far its picture is from PyTorch's.

Everything but `torch_backends`, `torch_parts` and what opens them works where torch is not installed.
"""
