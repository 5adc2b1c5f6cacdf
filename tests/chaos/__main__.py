"""`python -m tests.chaos`: mixed traffic under kills and hostile models, then one fault after another under light load.

Faults that need what is not there, such as the right to mount, are skipped with the reason. Ends with exit code 1 where
an answer was wrong, a request hung, or the service did not recover.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import disks, processes
from tests.chaos.mixed import run_mixed
from tests.chaos.rig import HEADER, Row, SkippedError, describe
from tests.servers import ROOT
from tests.traffic import end_when_told

FAULTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "stops": processes.stops,
    "files": processes.files,
    "memory": processes.memory,
    "full": disks.full,
    "slow": disks.slow,
    "clock": disks.clock,
    "models": disks.models,
}


def main() -> int:
    """Run what was asked for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    names = ("mixed", *FAULTS)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=30.0, help="of mixed traffic (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    flags = parser.parse_args()
    end_when_told()
    is_good = "mixed" not in flags.only or run_mixed(flags.models_dir, flags.seconds, flags.workers, flags.seed)
    print(f"\n{HEADER}", flush=True)
    for name, fault in FAULTS.items():
        if name in flags.only:
            is_good &= run_fault(name, fault)
    print("nothing was wrong, nothing hung, all recovered" if is_good else "FAILED")
    return 0 if is_good else 1


def run_fault(name: str, fault: Callable[[Path], Iterator[Row]]) -> bool:
    """Let one group of faults happen, in a folder of its own, and tell whether all is well."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            rows = list(fault(Path(folder)))
            return all(row.is_good for row in rows)
        except SkippedError as reason:
            print(describe(Row(name, skipped=str(reason))), flush=True)
            return True


if __name__ == "__main__":
    sys.exit(main())
