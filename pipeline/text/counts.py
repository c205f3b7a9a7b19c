"""Counts in sentences: "1 row is", "2 rows are"."""


def counted(count: int, things: str) -> str:
    """A count with its noun, which is given in the plural: "1 row", "1,200 rows"."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def agreeing(count: int, one: str = "is", many: str = "are") -> str:
    """The word that agrees with a count: `one` with 1, else `many`."""
    return one if count == 1 else many
