"""Run scenarios by seed: `python -m tests.simulation --help`. A failing seed is replayed with a trace."""

import argparse
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from tests.simulation import batcher, engine, reconciler, supervisor
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.world import World

SCENARIOS: dict[str, Callable[[World], None]] = {
    "batcher": batcher.simulate,
    "engine": engine.simulate,
    "reconciler": reconciler.simulate,
    "supervisor": supervisor.simulate,
}
SEEDS = {"batcher": 10_000, "engine": 2_000, "reconciler": 3_000, "supervisor": 10_000}  # in CI, all in all 25,000
CHUNK = 100  # seeds that a process runs at a time
TRACE_LINES = 80


def run_seed(name: str, seed: int, tracing: bool = False) -> World:
    """Run one seed of a scenario; what went wrong in it is the world's `failure`."""
    world = World(seed, tracing)
    try:
        SCENARIOS[name](world)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        world.fail(error)
    finally:
        world.close()
    return world


def find_failure(name: str, seeds: range) -> int | None:
    """Return the first of some seeds that fails."""
    return next((seed for seed in seeds if run_seed(name, seed).failure), None)


def find_failures(name: str, seeds: range, jobs: int) -> Iterator[int]:
    """Yield a failing seed of each chunk that has one."""
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    if jobs == 1:
        found = map(find_failure, repeat(name), chunks)
        yield from (seed for seed in found if seed is not None)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from (seed for seed in pool.map(find_failure, repeat(name), chunks) if seed is not None)


def replay(name: str, seed: int, lines: int = TRACE_LINES) -> bool:
    """Run a seed with a trace, show the end of it, and tell whether it passes."""
    world = run_seed(name, seed, tracing=True)
    print(*world.trace[-lines:], sep="\n")
    digest = hashlib.sha256("\n".join(world.trace).encode()).hexdigest()[:16]
    print(f"{name} {seed}: {world.failure or 'passes'} (trace {digest}, {len(world.trace)} lines)")
    if world.failure and not isinstance(world.failure, AssertionError):
        traceback.print_exception(world.failure)
    return world.failure is None


def run(name: str, seeds: range, jobs: int) -> bool:
    """Run the seeds of a scenario, report, and tell whether all pass."""
    began = time.monotonic()
    failed = next(find_failures(name, seeds, jobs), None)
    seconds = time.monotonic() - began
    if failed is None:
        print(f"{name}: {len(seeds):,} seeds pass, in {seconds:.0f} s", flush=True)
        return True
    replay(name, failed)
    print(f"replay it with: {sys.executable} -m tests.simulation {name} --replay {failed}", flush=True)
    return False


def find(mutant: Mutant) -> bool:
    """Run seeds until one finds a mutant, and report."""
    with mutant.installed():
        for seed in range(SEEDS[mutant.scenario]):
            failure = run_seed(mutant.scenario, seed).failure
            if failure:
                break
    if failure and not run_seed(mutant.scenario, seed).failure:
        print(f"{mutant.scenario}: {mutant.title}: found by seed {seed}: {failure}"[:200], flush=True)
        return True
    print(f"{mutant.scenario}: {mutant.title}: NOT FOUND by {SEEDS[mutant.scenario]:,} seeds", flush=True)
    return False


def main(arguments: Sequence[str] | None = None) -> bool:
    """Do what the arguments say; tell whether all is well."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--times", type=int, default=1, help="as many seeds as in CI, and so many times (default: 1)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="show the trace of one seed")
    parser.add_argument("--lines", type=int, default=TRACE_LINES, help=f"of the trace (default: {TRACE_LINES})")
    parser.add_argument("--mutants", action="store_true", help="see that bugs put in on purpose are found")
    options = parser.parse_args(arguments)
    names = options.scenarios or list(SCENARIOS)
    if options.mutants:
        outcomes = [find(mutant) for mutant in MUTANTS if mutant.scenario in names]
    elif options.replay is not None:
        outcomes = [replay(name, options.replay, options.lines) for name in names]
    else:
        first, times = options.first, options.times
        outcomes = [run(name, range(first, first + SEEDS[name] * times), options.jobs) for name in names]
    return all(outcomes)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets belongs to what a seed decides
        command = [sys.executable, "-m", "tests.simulation", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PYTHONHASHSEED": "0"})
    sys.exit(not main())
