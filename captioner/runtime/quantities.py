"""Quantities for people to read."""


def bytes_text(count: float) -> str:
    """A number of bytes in units of 1000: "378.2 MB"."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:.0f} bytes"
