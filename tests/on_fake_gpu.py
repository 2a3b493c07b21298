"""The `stamo` command on a fake GPU: `python on_fake_gpu.py COUNTS train …` writes what it was asked into COUNTS.

A file of its own for each rank: COUNTS.0, COUNTS.1, ….
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fake_gpu import FakeGpu

from stamo_dist import cli, device


class Counted(FakeGpu):
    def synchronize(self) -> None:  # the last that a process does
        super().synchronize()
        said = {**self.cuda.said, "modes": self.cuda.modes, "selected": self.cuda.selected}
        Path(f"{counts}.{os.environ.get('RANK', '0')}").write_text(json.dumps(said))


counts = sys.argv.pop(1)
device._current = Counted()
cli.main()
