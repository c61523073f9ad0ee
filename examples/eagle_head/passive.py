"""Threads that wait without spinning; imported before torch, which reads it when it is loaded.

Threads that spin at each barrier take ten times as long once another process runs beside them, and
what generates or trains for hours has company.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
