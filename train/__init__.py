"""The training driver: data preparation, loader, loop, checkpoints, command line."""
