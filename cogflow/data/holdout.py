"""Choose the clips that are held out of training, for the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

from cogflow.errors import DataError
from cogflow.records.cache_records import CacheIndex

MOST_HELD_OUT = 8
"""Largest number of clips that are held out by default."""
LARGE_SHARE = 0.2
"""Share of held-out clips above which a warning names a smaller number."""


def default_holdout(clips: int) -> int:
    """Return the number of clips that are held out of ``clips`` by default: a tenth, at least 1 and at most 8."""
    return max(1, min(MOST_HELD_OUT, clips // 10))


def resolve_holdout(holdout: int | None, clips: int, what: str) -> int:
    """Return ``data.holdout``, by default :func:`default_holdout` of ``clips``.

    ``what``: words behind the number of clips in the message, such as "clips are listed in my/folder".

    Raises :class:`DataError` for a number that leaves no clip to train on.
    """
    if holdout is None:
        return default_holdout(clips)
    if holdout >= clips:
        wanted = default_holdout(clips) if clips > 1 else 0
        raise DataError(
            f"data.holdout={holdout} leaves no clip to train on: {clips} {what}",
            f"set data.holdout={wanted}, or leave it out: by default a tenth of the clips is held out",
        )
    return holdout


def split_holdout(sources: Sequence[str], holdout: int) -> tuple[list[int], list[int]]:
    """Return the positions to train on and to hold out, given each clip's content hash.

    The clips with the smallest hashes are held out, so that the choice does not depend on names, order or other clips.
    Equal content stays together, and at least half of the clips remain for training.
    """
    limit = min(holdout, len(sources) // 2)
    groups: dict[str, list[int]] = {}
    for position, source in enumerate(sources):
        groups.setdefault(source, []).append(position)
    held: list[int] = []
    for source in sorted(groups):
        if len(held) + len(groups[source]) <= limit:
            held += groups[source]
    return sorted(set(range(len(sources))) - set(held)), sorted(held)


def holdout_warnings(index: CacheIndex) -> list[str]:
    """Return a warning on a large share of held-out clips, and on fewer held-out clips than were asked for."""
    train, held, wanted = len(index.train), len(index.holdout), index.settings.holdout
    total = train + held
    asked = "" if wanted is None else f" (data.holdout={wanted})"
    warnings = []
    if held > max(default_holdout(total), LARGE_SHARE * total):
        warnings.append(
            f"{held} of {total} clips are held out{asked}, and {train} are left to train on; "
            f"data.holdout={default_holdout(total)} holds out a tenth"
        )
    if wanted is not None and held < wanted:
        warnings.append(
            f"data.holdout={wanted}, but {held} of {total} clips are held out: at least half of the clips are trained "
            "on, and clips of equal content stay together"
        )
    return warnings
