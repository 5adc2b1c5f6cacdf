"""Command line: `python -m training --list | <recipe>… | --all | autograd`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.arguments import read_positive, read_rate, read_seeds, read_sizes
from training.errors import TrainingError

if TYPE_CHECKING:
    from service.model.manifest import Manifest

AUTOGRAD = "autograd"
TRIAL = ("lr", "batch_size", "optimizer", "hidden")
INTERRUPTED = 130  # as shells report a program ended by Ctrl-C
TERMINATED = 143


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train models and publish each, as TorchScript and ONNX with a manifest, into the models folder.",
        epilog=f"`python -m training {AUTOGRAD}` is a tour of autograd; it trains nothing. A run that fails any check"
        " publishes nothing and exits 1.",
    )
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"what to train, see --list; or {AUTOGRAD!r}")
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    parser.add_argument("--all", action="store_true", help="train every recipe")
    parser.add_argument(
        "--recipes-from", type=Path, metavar="FILE", help="a Python file with recipes of your own, see docs/training.md"
    )
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="where to publish (default: models)")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="where data sets are, or are downloaded to (default: data)"
    )
    parser.add_argument(
        "--seeds",
        type=read_seeds,
        default=(0,),
        help="of initial parameters and shuffling, such as 0-2 or 0,5; the best on validation is published, or the"
        " first if the recipe does not validate (default: 0)",
    )
    parser.add_argument(
        "--epochs", type=read_positive, help="passes over the training data (default: the recipe's own)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto, a GPU where the recipe benefits)"
    )
    parser.add_argument("--version", type=read_positive, help="version to publish as (default: the next free one)")
    trial = parser.add_argument_group("trials", "other hyperparameters than the recipe's; they need --no-publish")
    trial.add_argument("--lr", type=read_rate, help="learning rate")
    trial.add_argument("--batch-size", type=read_positive, help="instances per step")
    trial.add_argument("--optimizer", choices=["sgd", "adamw"], help="adamw is Adam where the recipe decays no weights")
    trial.add_argument("--hidden", type=read_sizes, help="sizes of the hidden layers of mnist, such as 512,128")
    parser.add_argument("--no-publish", action="store_true", help="do everything but publish, such as for a trial")
    parser.add_argument(
        "--force", action="store_true", help="publish also if the published version is better on validation"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.recipes == [AUTOGRAD]:
        from training import autograd_tour  # noqa: PLC0415 - `--help` should not wait for torch

        autograd_tour.main()
        return 0
    try:
        signal.signal(signal.SIGTERM, _leave)
        return _train(parser, options)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return INTERRUPTED


def _train(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from service.model.version_folder import load_manifest  # noqa: PLC0415 - `--help` should not wait for torch
    from training.recipes import load_recipes  # noqa: PLC0415
    from training.run import Request, rehearse, run  # noqa: PLC0415

    recipes = load_recipes(options.recipes_from)
    if options.list:
        for recipe in recipes.values():
            print(f"{recipe.name:18} {recipe.task:11} {recipe.title}")
        return 0
    names = list(recipes) if options.all else options.recipes
    if not names:
        parser.error("name a recipe, or give --all or --list")
    unknown = [name for name in names if name not in recipes]
    if unknown:
        parser.error(f"unknown recipe {unknown[0]!r}; choose from {', '.join(recipes)}")
    changes = {name: value for name in TRIAL if (value := getattr(options, name)) is not None}
    if changes and not options.no_publish:
        parser.error(
            f"--{next(iter(changes)).replace('_', '-')} is for trials: add --no-publish, or write a recipe of your own"
            " (docs/your-own-recipe.md)"
        )
    request = Request(
        models_dir=options.models_dir,
        data_dir=options.data_dir,
        seeds=tuple(options.seeds),
        epochs=options.epochs,
        device=options.device,
        version=options.version,
        force=options.force,
        changes=changes,
    )
    for name in dict.fromkeys(names):
        try:
            if options.no_publish:
                print(f"{name}: not published  {_summarize(rehearse(recipes[name], request))}", flush=True)
                continue
            folder = run(recipes[name], request)
        except KeyboardInterrupt:
            print(f"interrupted; {name} was not published", file=sys.stderr)
            return INTERRUPTED
        print(f"{name}: published {folder}  {_summarize(load_manifest(folder))}", flush=True)
    return 0


def _summarize(manifest: "Manifest") -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items())


def _leave(_signal: int, _frame: object) -> None:
    """Turn SIGTERM into an exception, so that partial files are removed on the way out."""
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
