"""`python -m training sweep mnist --seeds 0-3`: recipes and seeds side by side, on one machine or a Ray cluster.

Each fit is a Ray task that runs the recipe's own code. The table is ranked by validation figures, or by seed if there
are none; the test figure beside them chooses nothing. Nothing is published without `--publish`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from training.arguments import read_positive, read_seeds
from training.errors import DataError, TrainingError


@dataclass(frozen=True)
class Trial:
    """The result of one fit; `error` is set if it failed."""

    recipe: str
    seed: int
    figures: dict[str, float]
    seconds: float = 0.0
    error: str = ""

    @property
    def rank(self) -> tuple[str, bool, float, float]:
        """Order by recipe, then best on validation first, as `seeds.choose_candidate` does; failures last."""
        figures = self.figures
        hits, loss = figures.get("validation_accuracy", 0.0), figures.get("validation_loss", 0.0)
        return self.recipe, bool(self.error), -hits, loss


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training sweep",
        description="Fit recipes from several seeds side by side and print a table; publish nothing unless asked.",
    )
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="see python -m training --list")
    parser.add_argument("--seeds", type=read_seeds, default=range(4), help="0-3, or 1,5,9 (default: 0-3)")
    parser.add_argument(
        "--epochs", type=read_positive, help="passes over the training data (default: the recipe's own)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: auto, a GPU if --gpus provides one)"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are (default: data)")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="where to publish (default: models)")
    parser.add_argument("--publish", action="store_true", help="fit each recipe's best seed again and publish it")
    parser.add_argument("--cpus", type=int, default=1, help="cores per fit (default: 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="fraction of a GPU per fit (default: 0)")
    parser.add_argument("--address", help="of a Ray cluster, or auto (default: start Ray on this machine)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return the exit status, 1 if a fit failed or Ray is missing."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    from training.recipes import RECIPES  # noqa: PLC0415 - `--help` should not wait for torch

    for name in options.recipes:
        if name not in RECIPES:
            parser.error(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    try:
        trials = sweep(options)
        print_table(trials)
        if options.publish:
            publish_best(trials, options)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if any(trial.error for trial in trials) else 0


def sweep(options: argparse.Namespace) -> list[Trial]:
    """Return the trials, each recipe's best first.

    Raises:
        DataError: Ray is not installed, or a data set is missing and cannot be downloaded.
    """
    try:
        import ray  # noqa: PLC0415 - an extra that only sweeps need
    except ImportError as error:
        raise DataError("a sweep needs Ray: pip install '.[train,ray]'") from error
    from training.recipes import RECIPES  # noqa: PLC0415

    names, folder = list(dict.fromkeys(options.recipes)), options.data_dir.resolve()
    for name in names:
        RECIPES[name].load(folder)  # once, so that the tasks do not all download it
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": str(options.cpus), "PYTHONPATH": paths}
    dashboard = {} if options.address else {"include_dashboard": False}
    ray.init(options.address or "local", runtime_env={"env_vars": threads}, log_to_driver=False, **dashboard)
    try:
        task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(fit_one)
        wanted = [(name, seed) for name in names for seed in options.seeds]
        pending = {
            task.remote(name, seed, options.epochs, options.device, folder): (name, seed) for name, seed in wanted
        }
        trials: dict[tuple[str, int], Trial] = {}
        while pending:
            (done,), _ = ray.wait(list(pending))
            name, seed = pending.pop(done)
            trials[name, seed] = collect(partial(ray.get, done), name, seed)
            print(f"{len(trials)} of {len(wanted)} fitted", file=sys.stderr)
    finally:
        ray.shutdown()
    return sorted((trials[each] for each in wanted), key=lambda trial: trial.rank)


def collect(read: Callable[[], Trial], name: str, seed: int) -> Trial:
    """Return a trial; if its process died, for example out of memory, that becomes its error."""
    try:
        return read()
    except Exception as error:  # Ray has many of its own
        return Trial(name, seed, {}, error=describe(error))


def describe(error: Exception) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if isinstance(error, TrainingError) else f"{type(error).__name__}: {lines[0] if lines else ''}"


def fit_one(name: str, seed: int, epochs: int | None, device: str, data_dir: Path) -> Trial:
    """Fit a recipe from one seed by its own code and measure it; runs in a Ray task."""
    import torch  # noqa: PLC0415

    from training.describe import build_manifest  # noqa: PLC0415
    from training.evaluate import best_epoch  # noqa: PLC0415
    from training.export import export  # noqa: PLC0415
    from training.nets import ServingNet  # noqa: PLC0415
    from training.recipes import RECIPES  # noqa: PLC0415
    from training.run import choose_device  # noqa: PLC0415
    from training.seeds import fit_seed, measure_candidate  # noqa: PLC0415
    from training.trainer import Settings  # noqa: PLC0415

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe, started = RECIPES[name], time.perf_counter()
    try:
        splits = recipe.load(data_dir)
        settings = Settings(recipe.epochs if epochs is None else epochs, choose_device(device, recipe))
        candidate = fit_seed(recipe, splits, seed, settings)
        serving = ServingNet(candidate.fitted.net, recipe.task).eval()
        manifest = build_manifest(recipe, 1, splits, export(serving, recipe.input.shape), serving)
        learned = {key: value for key, value in vars(best_epoch(candidate.fitted)).items() if value is not None}
        tested = {f"test_{key}": value for key, value in measure_candidate(candidate, splits, manifest).items()}
    except Exception as error:  # for example out of memory: the other fits go on
        return Trial(name, seed, {}, time.perf_counter() - started, describe(error))
    return Trial(name, seed, learned | tested, candidate.seconds)


def print_table(trials: Sequence[Trial]) -> None:
    """Print one line per trial: seconds, training and validation figures, the first test figure."""
    for trial in trials:
        test = next((key for key in trial.figures if key.startswith("test_")), "")
        shown = [key for key in trial.figures if not key.startswith("test_")] + ([test] if test else [])
        figures = "  ".join(f"{key} {trial.figures[key]:.4f}" for key in shown)
        print(f"{trial.recipe:18} seed {trial.seed:<4} {trial.seconds:7.1f} s  {trial.error or figures}")


def publish_best(trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Publish each recipe's best trial by an ordinary run, with all its checks."""
    from training.recipes import RECIPES  # noqa: PLC0415
    from training.run import Request, run  # noqa: PLC0415

    for name in dict.fromkeys(trial.recipe for trial in trials if not trial.error):
        best = next(trial for trial in trials if trial.recipe == name)
        request = Request(options.models_dir, options.data_dir, (best.seed,), options.epochs, options.device)
        print(f"{name}: published {run(RECIPES[name], request)}", flush=True)
