"""The `stamo` command: a file for each group of commands, assembled by `app`.

Torch is imported only inside the commands that need it.
"""

from __future__ import annotations

import gc

from stamo_dist.shipped import reach_data_tools
from stamo_dist.words import print_in_any_locale

reach_data_tools()


def main() -> None:
    """Console entry."""
    print_in_any_locale()
    gc.disable()  # imports make objects that stay: looking for garbage among them takes a fifth of a quick command
    from stamo_dist.cli.app import main as run  # here, so that one file of commands can be imported without the rest

    gc.freeze()
    gc.enable()
    run()
