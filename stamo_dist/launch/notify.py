"""Messages about the end of a run to a web address of the user's, which only the environment knows.

The address is neither logged nor recorded, and the run's processes do not get it.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stamo_dist.launch.logs import first_error
from stamo_dist.launch.record import Event, Launch, finished
from stamo_dist.launch.run_progress import read_progress

WEBHOOK = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
#: An event that ends a run → what it is for `notify.on`.
ENDS: Mapping[str, tuple[str, ...]] = {
    "finished": ("end",), "cancelled": ("end",), "failed": ("end", "failure"), "stopped": ("end", "failure"),
}  # fmt: skip
_PATIENCE = 4.0  # seconds in all
_LATE = "no answer in time"


def variable(webhook: str) -> str:
    """The name of the environment variable with the address: `$NAME` or `${NAME}` → NAME."""
    match = WEBHOOK.fullmatch(webhook)
    assert match is not None, "the profile has checked it"
    return match[1] or match[2]


def hidden(profile: Mapping[str, Any]) -> dict[str, str]:
    """The environment of processes that need not know the address."""
    webhook = (profile.get("notify") or {}).get("webhook")
    return {variable(webhook): ""} if webhook else {}


def unheard(profile: Mapping[str, Any]) -> list[str]:
    """A note if the address is not at hand."""
    names = [name for name in hidden(profile) if not os.environ.get(name)]
    return [f"notify.webhook: ${name} is not set here: nobody is told, unless setup lines set it" for name in names]


def tell_end(launch: Launch, event: Event) -> str:
    """Post that the run has ended, if its profile asks for it; returns what is to be said in the log, "" for nothing.

    Takes a few seconds at most, and never raises.
    """
    asked = launch.profile.get("notify") or {}
    webhook = asked.get("webhook")
    if not webhook or not set(asked.get("on", ())) & set(ENDS.get(event.event, ())):
        return ""
    if event.event == "finished" and launch.tasks > 1 and finished(launch) is None:
        return ""  # other tasks of the array are still at it
    name = variable(webhook)
    address = os.environ.get(name, "")
    if not address:
        return f"notify: ${name} is not set here, so nobody was told"
    if not address.startswith(("http://", "https://")):
        return f"notify: ${name} holds no http address, so nobody was told"
    wrong = [_LATE]

    def post() -> None:
        wrong[0] = _post(address, message(launch, event))

    thread = threading.Thread(target=post, name="notify", daemon=True)  # looking a name up knows no time limit
    thread.start()
    thread.join(_PATIENCE)
    return f"notify: ${name}: {wrong[0]}, so nobody was told" if wrong[0] else f"notify: told ${name}"


def message(launch: Launch, event: Event) -> dict[str, Any]:
    """What is posted: facts for programs, and a `text` as chat services show it."""
    progress = read_progress(Path(launch.run_dir))
    reason = event.reason
    if event.event == "failed" and (error := first_error(launch.run_dir)):
        reason = f"{error} ({reason})" if reason else error
    at = f" at step {progress.step} of {progress.steps}" if progress.steps else ""
    text = f"{launch.name}: {event.event}{at}{f': {reason}' if reason else ''} ({launch.run_dir})"
    about: dict[str, Any] = {"run_dir": launch.run_dir, "job": event.job, "cluster": launch.cluster}
    about |= {"event": event.event, "reason": reason, "step": progress.step, "steps": progress.steps}
    return {"text": text, "run": launch.name, **about}


def _post(address: str, content: Mapping[str, Any]) -> str:
    """What went wrong, without the address; "" if nothing."""
    import urllib.request  # here: takes long, and every submission imports this file
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError

    headers = {"Content-Type": "application/json", "User-Agent": "stamo-dist"}
    try:
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=_PATIENCE):
            return ""
    except HTTPError as e:
        return f"it answered {e.code}"
    except (OSError, HTTPException, ValueError) as e:
        cause = e.reason if isinstance(e, URLError) else e
        if isinstance(cause, TimeoutError):
            return _LATE
        return getattr(cause, "strerror", None) or type(cause).__name__
