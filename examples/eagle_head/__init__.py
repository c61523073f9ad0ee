"""An EAGLE-3 draft head for the demo's model: its data, its training and what it achieves.

In this order: ``generate`` (the model answers prompts of its own and ours: ``prompts``,
``conversation``, ``decoder``; kept by ``store``), ``train`` (``training``: ``labels``, ``rows``,
``network``, ``loss``; the course of it: ``plot``) and ``evaluate``. What comes of it is written by
``layout``; ``head`` is what serving uses.
"""
