"""NVIDIA GPUs for hwcore. Importing this package imports no torch."""
