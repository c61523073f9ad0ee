"""A small serving engine, and what it shows on a real model: ``python -m examples.serving``.

The engine, top-down: ``engine`` (the loop), ``request`` and ``scheduler`` (who runs), ``kv_pool``
(who owns what), ``worker`` (a step on the device), ``drafting`` (prompt lookup) and ``eagle`` (a
head that runs ahead), ``llama`` (the forward). ``serve`` runs it in every way and compares.

One text at a time, with trees of the size that pays: ``decode``, then ``drafters``, ``lookup``,
``sizing``, ``step`` and ``model``.
"""

import importlib.util
import os

# Once the packages are installed all is on this machine; and the demo shows its own progress.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

for _package in ("transformers", "gguf", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        _message = f"examples.serving needs {_package}: pip install 'hwcore[demo]'"
        raise ImportError(_message)
