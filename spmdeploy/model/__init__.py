"""The SPM progressive generator in PyTorch (Luo et al., ECCV 2022, arXiv 2207.06252)."""

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
"""Files that `weights.load_checkpoint` reads. Kept here, where asking for it does not import torch."""
