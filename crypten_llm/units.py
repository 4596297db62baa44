"""Amounts in words, as every room of the project says them."""


def size(count: float) -> str:
    """Bytes for people: 0, 12 KB, 3.4 MB (powers of 1,000, as networks count)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"
