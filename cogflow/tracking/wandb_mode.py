"""Choose W&B's mode from the settings, the environment and the credentials that are present."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from cogflow.runtime.console import echo


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
    return mode


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
    named = os.environ.get("WANDB_BASE_URL")
    if named:
        return [urlsplit(named).netloc]
    import wandb

    return [urlsplit(wandb.Settings().base_url).netloc, "api.wandb.ai"]
