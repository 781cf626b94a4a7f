"""Choose W&B's mode from the settings, the environment and the credentials that are present."""

from __future__ import annotations

import configparser
import netrc
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from cogflow.errors import DataError
from cogflow.files.contained_files import read_regular
from cogflow.runtime.console import echo

SERVER = "https://api.wandb.ai"
"""W&B's own server."""
MOST_SETTINGS_BYTES = 1 << 16
HARMLESS = {"mode", "project", "entity", "disabled"}
"""Keys of a settings file that do not change where a key is sent."""


def choose_mode(wanted: str) -> str:
    """Return offline, online or disabled. ``WANDB_MODE`` and ``WANDB_DISABLED`` override ``wanted``.

    Online without a key becomes offline, with a warning.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    mode = (os.environ.get("WANDB_MODE") or wanted).strip().lower()
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in ("offline", "online", "disabled"):
        echo(f"warning: W&B mode {mode!r} is none of online, offline, disabled; going on offline")
        return "offline"
    if mode == "online" and not has_key():
        echo("warning: W&B should be online, but no key is set (WANDB_API_KEY or `wandb login`); going on offline")
        return "offline"
    if mode == "online" and (found := foreign_settings(Path.cwd())):
        echo(f"warning: {found}, so that the key could be sent elsewhere; remove it to go online; going on offline")
        return "offline"
    return mode


def foreign_settings(folder: Path) -> str:
    """Return what a settings file of W&B in the working ``folder`` changes, a clause; empty when that is harmless.

    W&B reads this file before the user's own. It may have come with somebody else's files, and may name another server,
    a proxy or a key.
    """
    for path in (folder / "wandb" / "settings", folder / ".wandb" / "settings"):
        if path.exists():
            keys = sorted(_settings_in(path).keys() - HARMLESS)
            if keys or not path.is_file():
                return f"{path} sets {', '.join(keys) or 'unknown values'}"
    return ""


def server_address() -> str:
    """Return the address that W&B's client is given: WANDB_BASE_URL, else that of the user's own settings file."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return named
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    return _settings_in(own).get("base_url", SERVER)


def _settings_in(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    with suppress(OSError, DataError, UnicodeDecodeError):
        try:
            parser.read_string(read_regular(path, MOST_SETTINGS_BYTES).decode("utf-8"))
        except configparser.Error:
            return {"what W&B may understand otherwise": ""}
    return {key: value for section in parser.sections() for key, value in parser.items(section)}


def has_key() -> bool:
    """Return whether W&B finds credentials without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = _hosts()
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            known = netrc.netrc(str(path))
            if any(known.authenticators(host) for host in hosts):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _hosts() -> list[str]:
    """Return the hosts whose keys W&B uses.

    Its own server has two names; older keys are stored under the older name.
    """
    if named := os.environ.get("WANDB_BASE_URL"):
        return [urlsplit(named).netloc]
    return [urlsplit(server_address()).netloc, "api.wandb.ai"]
