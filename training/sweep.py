"""`python -m training sweep mnist --seeds 0-3`: recipes and seeds side by side, on one machine or a Ray cluster.

Each fit is a Ray task that runs the recipe's own code. The table is ranked by validation, where a recipe has such a
split; the test figure stands beside it and chooses nothing. Nothing is published unless `--publish` is given.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.errors import DataError, TrainingError

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Trial:
    """What one fit gave; `error` is set where it failed."""

    recipe: str
    seed: int
    figures: dict[str, float]
    seconds: float = 0.0
    error: str = ""

    @property
    def rank(self) -> tuple[str, bool, float, float]:
        """Order by recipe, then the best on validation first, or by the training loss where there is no validation."""
        figures = self.figures
        loss = figures.get("validation_loss", figures.get("loss", 0.0))
        return self.recipe, bool(self.error), -figures.get("validation_accuracy", 0.0), loss


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training sweep",
        description="Fit recipes from several seeds side by side, print a table, and publish nothing unless asked.",
    )
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="see python -m training --list")
    parser.add_argument("--seeds", type=read_seeds, default=range(4), help="0-3, or 1,5,9 (default: 0-3)")
    parser.add_argument("--epochs", type=int, help="passes over the training data (default: the recipe's own)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are (default: data)")
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="where to publish (default: models)")
    parser.add_argument("--publish", action="store_true", help="publish each recipe's best seed, fitted once more")
    parser.add_argument("--cpus", type=int, default=1, help="cores that one fit takes (default: 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="share of a GPU that one fit takes (default: 0)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto (default: this machine alone)")
    return parser


def read_seeds(text: str) -> Sequence[int]:
    """Return the seeds of `0-3` or `1,5,9`."""
    try:
        first, _, last = text.partition("-")
        seeds = list(range(int(first), int(last) + 1)) if last else [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not 0 < len(seeds) <= MOST_SEEDS or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0-3 or 1,5,9")
    return seeds


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return the exit status: 1 where a fit failed or there is no Ray."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    from training.recipes import RECIPES  # noqa: PLC0415 - `--help` should not wait for torch

    for name in options.recipes:
        if name not in RECIPES:
            parser.error(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
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
        DataError: Ray is not installed.
    """
    try:
        import ray  # noqa: PLC0415 - an extra that nothing else of training needs
    except ImportError as error:
        raise DataError("a sweep needs Ray: pip install '.[train,ray]'") from error
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    threads = {"OMP_NUM_THREADS": str(options.cpus), "PYTHONPATH": paths}
    dashboard = {} if options.address else {"include_dashboard": False}
    ray.init(options.address or "local", runtime_env={"env_vars": threads}, log_to_driver=False, **dashboard)
    try:
        task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(fit_one)
        folder = options.data_dir.resolve()
        wanted = [(name, seed) for name in dict.fromkeys(options.recipes) for seed in options.seeds]
        pending = [task.remote(name, seed, options.epochs, options.device, folder) for name, seed in wanted]
        trials: list[Trial] = []
        while pending:
            done, pending = ray.wait(pending)
            trials += ray.get(done)
            print(f"{len(trials)} of {len(wanted)} fitted", file=sys.stderr)
    finally:
        ray.shutdown()
    return sorted(trials, key=lambda trial: trial.rank)


def fit_one(name: str, seed: int, epochs: int | None, device: str, data_dir: Path) -> Trial:
    """Fit a recipe from one seed by its own code and measure it; runs in a Ray task."""
    import torch  # noqa: PLC0415

    from training.describe import build_manifest  # noqa: PLC0415
    from training.evaluate import best_epoch  # noqa: PLC0415
    from training.export import export  # noqa: PLC0415
    from training.loop import Settings  # noqa: PLC0415
    from training.nets import ServingNet  # noqa: PLC0415
    from training.recipes import RECIPES  # noqa: PLC0415
    from training.run import choose_device  # noqa: PLC0415
    from training.seeds import fit_seed, measure_candidate  # noqa: PLC0415

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
    except TrainingError as error:
        return Trial(name, seed, {}, time.perf_counter() - started, str(error))
    return Trial(name, seed, learned | tested, candidate.seconds)


def print_table(trials: Sequence[Trial]) -> None:
    """Print a line a trial: what was learned, the first test figure, and the seconds."""
    for trial in trials:
        test = next((key for key in trial.figures if key.startswith("test_")), "")
        shown = [key for key in trial.figures if not key.startswith("test_")] + ([test] if test else [])
        figures = "  ".join(f"{key} {trial.figures[key]:.4f}" for key in shown)
        print(f"{trial.recipe:18} seed {trial.seed:<4} {trial.seconds:7.1f} s  {trial.error or figures}")


def publish_best(trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Publish each recipe's best trial by an ordinary run, which proves all that a run proves."""
    from training.recipes import RECIPES  # noqa: PLC0415
    from training.run import Request, run  # noqa: PLC0415

    for name in dict.fromkeys(trial.recipe for trial in trials if not trial.error):
        best = next(trial for trial in trials if trial.recipe == name)
        request = Request(options.models_dir, options.data_dir, (best.seed,), options.epochs, options.device)
        print(f"{name}: published {run(RECIPES[name], request)}", flush=True)
