"""Handwritten digits by latent diffusion, in three roles that hold trained networks of their own.

Top-down: ``requests`` (what is asked for), ``monolithic`` (all of it in one process), ``model``
(what each role does) with ``networks`` and ``prompts``. How the networks came to be: ``train``,
``training``, ``digits``; how good they are: ``judge``, ``evaluate``. Pictures: ``picture`` of
samples, ``timeline`` of who did what when.
"""
