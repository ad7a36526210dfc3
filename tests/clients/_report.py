"""What the scripts share: lines of figures, printed as they come."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

# "what" was measured, and figures by their names. "holds", where it is there, says
# whether what is claimed of this line is so.
Row = Mapping[str, Any]


def report(title: str, packages: Iterable[str], rows: Iterable[Row]) -> int:
    """Print the title, versions and `rows`; the exit code is 1 if a claim fails."""
    names = ("jax", "flax", *packages)
    print(f"{title} ({', '.join(f'{name} {version(name)}' for name in names)})")
    holds = True
    for row in rows:
        what, *cells = (_cell(name, value) for name, value in row.items())
        print(f"{what:36}", *cells, sep="  ", flush=True)
        holds &= row.get("holds", True)
    return 0 if holds else 1


def _cell(name: str, value: Any) -> str:
    if name == "what":
        return value
    if isinstance(value, bool):
        return f"{name}: {'yes' if value else 'NO'}"
    # As it is read: 1234, 330.6, 0.1234, 1.234e-07.
    form = ".0f" if abs(value) >= 1000 else ".4g"
    return f"{f'{name}: {value:{form}}':20}"
