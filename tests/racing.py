"""Let two processes export into one folder at the same moment, several times. Run by test_faults.

`python -m tests.racing WORK ROUNDS`, with `WORK/adapter`. Prints JSON: for each round both exit codes, sorted, the
digest of the output, and what is left beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.workflow import export
from tests.conftest import digest_folder


def fork_export(work: Path, out: Path, gate: int) -> int:
    """A child that waits at the gate, exports and exits with the error's code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.read(gate, 1)
        export(work / "adapter", out, check=False)
        code = 0
    except SurgeryError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def race(work: Path, number: int) -> dict[str, object]:
    """One round."""
    out = work / f"merged-{number}" / "merged"
    out.parent.mkdir()
    gate, opener = os.pipe()
    children = [fork_export(work, out, gate) for _ in range(2)]
    os.write(opener, b"xx")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    left = sorted(path.name for path in out.parent.iterdir() if path != out)
    return {"codes": codes, "digest": digest_folder(out), "left": left}


if __name__ == "__main__":
    sys.stdout.write(json.dumps([race(Path(sys.argv[1]), number) for number in range(int(sys.argv[2]))]))
