"""Two values that cannot both be right, who says each, and the word that would settle it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cogflow.config.build import show
from cogflow.errors import PipelineError


@dataclass(frozen=True)
class Contradiction:
    """``key`` (``vae.scaling_factor``) has ``value`` by ``source``; ``needed`` by ``needed_source`` it should have ``needed``.

    ``why`` joins the two (the transformer was trained with). ``override``: words of a command line that would make it right.
    """

    key: str
    value: Any
    source: str
    why: str
    needed: Any
    needed_source: str
    override: str

    def line(self) -> str:
        return (
            f"{self.key} is {show(self.value)} ({self.source}); {self.why} {show(self.needed)} ({self.needed_source}). "
            f"To make it right: {self.override}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle(
    problems: Sequence[str], found: Iterable[Contradiction], force: Sequence[str]
) -> tuple[list[Contradiction], list[str]]:
    """The contradictions that ``force`` names, and the names in ``force`` that nothing contradicts.

    ``problems`` cannot be forced: code, files that are broken or missing. Raises one :class:`PipelineError` with everything else.
    """
    found = list({one.key: one for one in found}.values())
    open_ones = [one.line() for one in found if one.key not in force]
    if problems or open_ones:
        hint = "Take each component from the model that was trained."
        if open_ones:
            keys = ",".join(one.key for one in found)
            hint = "Take each component from the model that was trained, or give the words that make it right."
            hint += f" stage.force=[{keys}] assembles all the same and says so in assembly.json and in the model card."
        raise PipelineError(
            "These components do not make one pipeline:\n" + "\n".join(f"  {x}" for x in [*problems, *open_ones]), hint
        )
    return [one for one in found if one.key in force], [key for key in force if key not in {one.key for one in found}]
