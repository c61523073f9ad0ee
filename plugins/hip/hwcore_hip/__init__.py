"""AMD GPUs for hwcore, through ROCm. Importing this package imports no torch."""
