"""Training of the SPM generator: data, holes, losses, the loop and its run directory."""
