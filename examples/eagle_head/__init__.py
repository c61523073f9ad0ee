"""An EAGLE-3 draft head for the demo's model: its data, its training and what it achieves.

In this order: ``generate`` (the model answers prompts of its own and ours; ``prompts``,
``conversation``, ``decoder``), ``train`` and ``evaluate``. ``head`` is what serving uses.
"""
