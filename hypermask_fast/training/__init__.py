"""Training a HyperMask model task after task: loop, metrics, checkpoints, logs."""
