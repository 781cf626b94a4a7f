"""Whether W&B is asked to go online, by the settings, the environment and the credentials that are there."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from cogflow.runtime.console import echo


def choose_mode(wanted: str) -> str:
    """offline, online or disabled: ``WANDB_MODE`` (or ``WANDB_DISABLED``) wins over ``wanted``; online without a key is offline."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    mode = (os.environ.get("WANDB_MODE") or wanted).strip().lower()
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in ("offline", "online", "disabled"):
        echo(f"warning: W&B mode {mode!r} is none of online, offline, disabled; going on offline")
        return "offline"
    if mode == "online" and not has_key():
        echo("warning: W&B is to be online, but no key is set (WANDB_API_KEY or `wandb login`); going on offline")
        return "offline"
    return mode


def has_key() -> bool:
    """Whether W&B will find credentials without asking for them."""
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
    """The hosts whose keys W&B takes. Its own server goes by two names, and older keys stand under the older one."""
    named = os.environ.get("WANDB_BASE_URL")
    if named:
        return [urlsplit(named).netloc]
    import wandb

    return [urlsplit(wandb.Settings().base_url).netloc, "api.wandb.ai"]
