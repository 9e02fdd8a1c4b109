"""What the adapter takes of Avalanche, which need not be installed where types are checked."""
