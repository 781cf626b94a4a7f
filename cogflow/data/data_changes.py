"""Compare two lists of clips and captions by name, and describe what changed with a few names and counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import TypeVar

from cogflow.records.cache_records import CacheIndex, CacheSettings

MOST_NAMES = 10
"""Names of each kind of change that are kept and shown."""
NOT_OF_FRAMES = ("holdout", "max_length")
"""Settings of the cache that do not shape the frames of a clip."""

Former = TypeVar("Former")
Present = TypeVar("Present")


@dataclass
class NameList:
    """The number of names that were added, and the first :data:`MOST_NAMES` of them."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < MOST_NAMES:
            self.names.append(name)

    def short(self) -> str:
        """Return the kept names and how many more there are."""
        rest = self.count - len(self.names)
        return ", ".join(self.names) + (f" and {rest} more" if rest else "")

    def line(self, what: str, verb: str) -> str:
        """Return one line, such as ``2 captions changed: a.mp4, b.mp4``. ``what``: the noun in the singular."""
        return f"{self.count} {what}{'' if self.count == 1 else 's'} {verb}: {self.short()}"


@dataclass
class DataChanges:
    """Changes between two lists of clips. ``others``: lines on settings, models and order."""

    captions: NameList = field(default_factory=NameList)
    clips: NameList = field(default_factory=NameList)
    missing: NameList = field(default_factory=NameList)
    added: NameList = field(default_factory=NameList)
    removed: NameList = field(default_factory=NameList)
    others: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return one line for each kind of change; an empty list when nothing changed."""
        named = (
            (self.captions, "caption", "changed"),
            (self.clips, "clip", "changed"),
            (self.missing, "clip", "listed without a file"),
            (self.added, "clip", "added"),
            (self.removed, "clip", "removed"),
        )
        return [names.line(what, verb) for names, what, verb in named if names.count] + self.others


@dataclass(frozen=True)
class ClipState:
    """A caption, and the key of its clip's tensors."""

    text: str
    clip: str


def compare_index(
    former: CacheIndex, present: Iterable[tuple[str, ClipState]], settings: CacheSettings, models: dict[str, str]
) -> DataChanges:
    """Return the changes from the index ``former`` to clips that were or will be prepared.

    ``present``: name and state of each clip. Clips are compared by the keys of their tensors, which depend on the
    settings and the VAE: where these differ, no single clip is named.
    """
    changes = DataChanges()
    differing = _differing_settings(former.settings, settings)
    changes.others += [f"data.{name}: {then} then, {now} now" for name, then, now in differing]
    vae_differs = former.models.get("vae") != models.get("vae")
    changes.others += ["the clips were encoded with another VAE"] if vae_differs else []
    text_models = [name for name in {**former.models, **models} if name != "vae"]
    if any(former.models.get(name) != models.get(name) for name in text_models):
        changes.others.append("the captions were encoded with another text encoder, tokenizer or dtype")
    same_frames = not vae_differs and all(name in NOT_OF_FRAMES for name, _, _ in differing)
    states = ((entry.name, ClipState(entry.text, entry.clip)) for entry in former.entries)
    for name, then, now in pair_by_name(states, present):
        if then is None:
            changes.added.add(name)
        elif now is None:
            changes.removed.add(name)
        else:
            if then.text != now.text:
                changes.captions.add(name)
            if same_frames and then.clip != now.clip:
                changes.clips.add(name)
    return changes


def compare_indexes(former: CacheIndex, present: CacheIndex) -> DataChanges:
    """Return the changes from one index to another; where nothing else differs, order or holdout do."""
    states = ((entry.name, ClipState(entry.text, entry.clip)) for entry in present.entries)
    changes = compare_index(former, states, present.settings, present.models)
    if not changes.lines() and former.fingerprint != present.fingerprint:
        changes.others.append("the order of the clips, or which of them are held out")
    return changes


def pair_by_name(
    former: Iterable[tuple[str, Former]], present: Iterable[tuple[str, Present]]
) -> Iterator[tuple[str, Former | None, Present | None]]:
    """Yield the name and both values of each clip; None on the side that lacks it.

    Both sides are read once, side by side. Memory is needed for clips whose place differs between the two sides only.
    """
    former_waiting: dict[str, deque[Former]] = {}
    present_waiting: dict[str, deque[Present]] = {}
    for one, other in zip_longest(former, present):
        if one is not None and other is not None and one[0] == other[0]:
            yield one[0], one[1], other[1]
            continue
        if one is not None:
            if waiting := present_waiting.get(one[0]):
                yield one[0], one[1], waiting.popleft()
            else:
                former_waiting.setdefault(one[0], deque()).append(one[1])
        if other is not None:
            if found := former_waiting.get(other[0]):
                yield other[0], found.popleft(), other[1]
            else:
                present_waiting.setdefault(other[0], deque()).append(other[1])
    for name, values in former_waiting.items():
        yield from ((name, value, None) for value in values)
    for name, added in present_waiting.items():
        yield from ((name, None, value) for value in added)


def _differing_settings(then: CacheSettings, now: CacheSettings) -> list[tuple[str, object, object]]:
    """Return name and values of the settings that differ; a value that one side does not know is left out."""
    pairs = [(one.name, getattr(then, one.name), getattr(now, one.name)) for one in fields(CacheSettings)]
    return [
        (name, before, after)
        for name, before, after in pairs
        if before != after and before is not None and after is not None
    ]
