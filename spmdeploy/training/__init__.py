"""Training of the SPM generator: losses, trainer, run folder."""
