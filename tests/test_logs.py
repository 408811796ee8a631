"""Lines of a log: what happened, and to whom."""

from __future__ import annotations

import subprocess
import sys


def test_a_line_has_the_fields_of_its_record() -> None:
    code = (
        "import logging; from edged import logs\n"
        "logs.to_stderr('worker %(levelname)s %(message)s')\n"
        "log = logging.getLogger('any')\n"
        "log.info('not told')\n"
        "log.warning('update refused', extra={'round': 3, 'member': 'phone'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "worker WARNING update refused round=3 member=phone\n"
