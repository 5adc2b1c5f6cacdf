"""`python -m tests.fuzz`: fuzz a running service, or one started on the models folder, round after round."""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.api import fuzz
from tests.servers import ROOT, Server
from tests.traffic import end_when_told

ROUND = 20  # requests for each operation and way of drawing them


def main() -> int:
    """Fuzz until the time is over; raise where an answer is not as documented."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: %(default)s)")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    parser.add_argument("--url", help="of a service that runs already")
    flags = parser.parse_args()
    end_when_told()
    if flags.url:
        return run(flags.url, flags.seed, flags.seconds)
    with Server(flags.models_dir) as server:
        return run(server.url, flags.seed, flags.seconds)


def run(url: str, seed: int, seconds: float) -> int:
    """Fuzz in rounds and print what was answered."""
    until = time.monotonic() + seconds
    answered: Counter[int] = Counter()
    while time.monotonic() < until:
        answered += fuzz(url, ROUND, seed)
        print(f"seed {seed}: {sum(answered.values())} requests, by status {dict(sorted(answered.items()))}", flush=True)
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
