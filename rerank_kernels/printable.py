"""What of a text may go to a terminal, or into JSON as it is: no character that would steer what shows it.

These are the controls of ASCII and of Latin-1 (C0 and C1, with ESC, CSI and DEL), the marks that turn the direction of a line,
separators that some programs take for the end of a line, and halves of surrogate pairs.
"""

from __future__ import annotations

import re

_MARKS = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
_STEERS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_MARKS}\ud800-\udfff]")  # a tab and a new line do no harm
_IN_JSON = re.compile(f"[\x7f-\x9f{_MARKS}]")  # JSON has no ASCII controls inside a string


def printable(text: str) -> str:
    """`text` with U+FFFD in the place of each such character."""
    return _STEERS.sub("\ufffd", text)


def escaped(json_text: str) -> str:
    """JSON that holds the same values, with such characters as \\uXXXX. They can stand inside strings only."""
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text)
