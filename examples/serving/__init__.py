"""A small serving engine, readable top-down: ``python -m examples.serving``.

Read ``__main__``, then ``decode`` with its ``lookup``, ``sizing`` and ``model``.
"""

import importlib.util
import os

# Once the packages are installed all is on this machine; and the demo shows its own progress.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

for _package in ("transformers", "gguf", "accelerate", "matplotlib"):
    if importlib.util.find_spec(_package) is None:
        _message = f"examples.serving needs {_package}: pip install 'hwcore[demo]'"
        raise ImportError(_message)
