"""Calls that a kernel of the table can do, drawn by Hypothesis."""

from refattn import strategies


def any_call(entry, most, tile):
    """Return a strategy of calls within a kernel's capabilities, with at most so many rows and keys."""
    return strategies.problems(
        dtypes=sorted(entry.capabilities.dtypes),
        features=entry.capabilities.features,
        max_rows=most,
        max_keys=most,
        max_dim=40,
        tile=tile,
        families=["normal"],
    )
