"""Keep keys and tokens out of every file: records, reports, W&B configs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cogflow.files.record_io import JsonObject, JsonValue

HIDDEN = "***"

# "token" counts only as the last word: max_tokens and tokenizer are settings, HF_TOKEN and access-token are secrets.
_WORDS = "api_?key|apikey|token|secret|secret_key|access_key|private_key|password|passwd|credentials?"
_NAME = re.compile(rf"(^|[_.\-])({_WORDS})$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?P<name>[\w.\-]*?(?:{_WORDS}))(?P<sign>=|:\s*|\s+)(?P<value>[^\s,;\"']+)", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST = 8  # a shorter value of a variable is more likely a common word than a key


def scrub(values: JsonObject) -> dict[str, JsonValue]:
    """Return a copy of ``values`` in which every secret is replaced by ``***``.

    A secret is a string under a key named like one, what a string assigns to such a name (``hf_token=...``), the user
    part of a URL, and any appearance of the value of an environment variable named like one.
    """
    return _scrub_object(values, _environment_secrets())


def scrub_text(text: str) -> str:
    """Return ``text`` with every secret replaced, as :func:`scrub` does."""
    return _scrub_text(text, _environment_secrets())


def shorten_home(values: JsonObject) -> dict[str, JsonValue]:
    """Return a copy of ``values`` in which the user's home folder is ``~``: its path holds the user's name."""
    home = json.dumps(str(Path.home()))[1:-1]
    shortened: dict[str, JsonValue] = json.loads(re.sub(rf"{re.escape(home)}(?=/|\"| )", "~", json.dumps(values)))
    return shortened


def is_secret_name(name: str) -> bool:
    """Return whether a key or a variable of this name holds a secret."""
    return bool(_NAME.search(name))


def environment_secrets_in(values: JsonValue, prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, name of the variable) of each text in ``values`` that contains the value of a secret."""
    if isinstance(values, Mapping):
        return [
            found
            for key, value in values.items()
            for found in environment_secrets_in(value, f"{prefix}.{key}" if prefix else key)
        ]
    if isinstance(values, list | tuple):
        return [found for value in values for found in environment_secrets_in(value, prefix)]
    if not isinstance(values, str):
        return []
    return [(prefix, name) for name, secret in _secret_variables().items() if secret in values]


def _secret_variables() -> dict[str, str]:
    """Return the environment variables that hold secrets. Paths are no secrets: ``..._TOKEN`` may name a file."""
    return {
        name: value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= _SHORTEST and not value.startswith(("/", "~", "./"))
    }


def _environment_secrets() -> list[str]:
    return sorted(set(_secret_variables().values()), key=len, reverse=True)


def _scrub_object(values: JsonObject, secrets: list[str]) -> dict[str, JsonValue]:
    return {
        key: HIDDEN if is_secret_name(key) and isinstance(value, str) and value else _scrub(value, secrets)
        for key, value in values.items()
    }


def _scrub(value: JsonValue, secrets: list[str]) -> JsonValue:
    if isinstance(value, str):
        return _scrub_text(value, secrets)
    if isinstance(value, Mapping):
        return _scrub_object(value, secrets)
    if isinstance(value, list | tuple):
        return [_scrub(inner, secrets) for inner in value]
    return value


def _scrub_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _ASSIGNED.sub(_hide_assigned, _IN_URL.sub(HIDDEN + "@", text))


def _hide_assigned(match: re.Match[str]) -> str:
    # Words in running text ("tokens such as") are no assignment; --token VALUE and token=VALUE are.
    spaced = match["sign"].isspace()
    if not is_secret_name(match["name"].lstrip("-")) or (spaced and not match["name"].startswith("-")):
        return match[0]
    return f"{match['name']}{match['sign']}{HIDDEN}"
