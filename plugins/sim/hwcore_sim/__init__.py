"""A simulated accelerator for hwcore.

``plugin.py`` and ``probe.py`` are a plugin as any vendor would write one, against hwcore's public
API alone. ``device/`` is what a vendor has in hardware and drivers: a PyTorch device in C++.
Importing this package imports no torch.
"""
