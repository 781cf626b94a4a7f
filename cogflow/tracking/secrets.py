"""Keep keys and tokens out of every file: records, reports, W&B configs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# "token" counts only as the last word: max_tokens and tokenizer are settings, HF_TOKEN and access-token are not.
_NAME = re.compile(
    r"(^|[_.\-])(api_?key|apikey|token|secret|secret_key|access_key|private_key|password|passwd|credentials?)$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"(?P<name>[\w.\-]*?(?:api_?key|apikey|token|secret|secret_key|access_key|private_key|password|passwd|credentials?))(?P<sign>=|:\s*|\s+)(?P<value>[^\s,;\"']+)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST = 8  # a shorter value of a variable is more likely a common word than a key


def scrub(value: Any) -> Any:
    """A copy of ``value`` (dicts, lists, strings, the rest as it is) with every secret replaced by ``***``.

    A secret is what stands under a key named like one, what a string assigns to such a name (``hf_token=...``), the user
    part of a URL, and any appearance of the value of an environment variable named like one.
    """
    return _scrub(value, _known())


def is_secret_name(name: str) -> bool:
    return bool(_NAME.search(name))


def _known() -> list[str]:
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


def _scrub(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_name(str(key)) and isinstance(inner, str) and inner else _scrub(inner, known)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_scrub(inner, known) for inner in value]
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, HIDDEN)
        value = _IN_URL.sub(HIDDEN + "@", value)
        return _ASSIGNED.sub(_assigned, value)
    return value


def _assigned(match: re.Match[str]) -> str:
    # Words that run on ("tokens such as") are prose; --token VALUE and token=VALUE are not.
    spaced = match["sign"].isspace()
    if not is_secret_name(match["name"].lstrip("-")) or (spaced and not match["name"].startswith("-")):
        return match[0]
    return f"{match['name']}{match['sign']}{HIDDEN}"
