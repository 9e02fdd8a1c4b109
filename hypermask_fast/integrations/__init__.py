"""HyperMask in other libraries for continual learning: one module per library, which is imported by nothing else."""
