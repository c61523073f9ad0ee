"""Race sanitizer: unordered accesses to the same memory, named on any device, whatever came out.

A missing wait between two streams gives the right value nearly always, and on a device that
happens to run in one order always. The sanitizer does not look at values. It keeps a vector clock
for each stream, fed by the backend's hooks, and compares the bytes that torch calls touch: two
accesses to one byte, one of them a write, that no edge orders are a race, reported with both lines
of the program, where the tensor was made, and the edge that is missing.

See ``docs/sanitizer.md``, and ``HWCORE_SANITIZE`` for a whole process.
"""

from hwcore.testing.sanitizer.annotations import annotate, kernel, rows
from hwcore.testing.sanitizer.reports import (
    Access,
    Race,
    RaceError,
    RaceWarning,
    SanitizerError,
)
from hwcore.testing.sanitizer.sanitizer import Sanitizer, attach_thread, enable, name

__all__ = [
    "Access",
    "Race",
    "RaceError",
    "RaceWarning",
    "Sanitizer",
    "SanitizerError",
    "annotate",
    "attach_thread",
    "enable",
    "kernel",
    "name",
    "rows",
]
