"""The core's operations as Triton kernels: one source for every device that runs Triton.

A plugin whose device does returns :func:`kernels` from its hook of that name. Each function here
takes what the portable reference of its name takes, and gives what that gives. Importing this
package imports no Triton; :func:`kernels` does.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from hwcore.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["kernels"]


def kernels() -> dict[str, Callable[..., Any]]:
    """Return the kernels by the names that the hook ``kernels()`` uses for them.

    Raises
    ------
    CapabilityError
        If Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        message = (
            "hwcore.kernels.triton: `triton` got no installed package; expected the Triton that "
            "belongs to the installed torch. Install the torch build of your device, which brings "
            "it along, or `pip install 'hwcore[triton]'`."
        )
        raise CapabilityError(message)
    from hwcore.kernels.triton.commit import commit_paths, move_kv
    from hwcore.kernels.triton.greedy import verify_tree_greedy
    from hwcore.kernels.triton.mrope import mrope_positions
    from hwcore.kernels.triton.relay import assert_and_invalidate, gather_rows
    from hwcore.kernels.triton.sampling import verify_tree_sampling
    from hwcore.kernels.triton.tree import build_tree

    found = (
        assert_and_invalidate,
        build_tree,
        commit_paths,
        gather_rows,
        move_kv,
        mrope_positions,
        verify_tree_greedy,
        verify_tree_sampling,
    )
    return {function.__name__: function for function in found}
