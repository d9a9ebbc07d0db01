"""The SPM progressive generator in PyTorch (Luo et al., ECCV 2022, arXiv 2207.06252)."""
