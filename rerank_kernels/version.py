"""The package's version, and that of its bits: NUMERICS.md says what a change of the second means."""

from __future__ import annotations

__version__ = "0.1.0"
NUMERICS_VERSION = 1
