"""Command line: `python -m training --list | <recipe>… | --all | autograd | tabular FILE | images FOLDER`."""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import TrainingError

if TYPE_CHECKING:
    from service.model.manifest import Manifest
    from training.recipe import Recipe

AUTOGRAD, TABULAR, IMAGES = "autograd", "tabular", "images"
TRIAL = ("lr", "batch_size", "optimizer", "hidden")
INTERRUPTED = 130  # as shells report a program ended by Ctrl-C
TERMINATED = 143
LARGEST = 2**31 - 1  # the highest version a manifest accepts
MOST_SEEDS = 1000


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of recipes."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train models and publish each, as TorchScript and ONNX with a manifest, into the models folder.",
        epilog=f"`python -m training {TABULAR} FILE --target COLUMN` trains on your own table, and `python -m training"
        f" {IMAGES} FOLDER` on your own pictures; each has its --help. `python -m training {AUTOGRAD}` is a tour of"
        " autograd; it trains nothing. A run that fails any check publishes nothing and exits 1.",
    )
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"what to train, see --list; or {AUTOGRAD!r}")
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    parser.add_argument("--all", action="store_true", help="train every recipe")
    parser.add_argument(
        "--recipes-from", type=Path, metavar="FILE", help="a Python file with recipes of your own, see docs/training.md"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="where data sets are, or are downloaded to (default: data)"
    )
    add_run_options(parser)
    trial = parser.add_argument_group("trials", "other hyperparameters than the recipe's; they need --no-publish")
    trial.add_argument("--lr", type=read_rate, help="learning rate")
    trial.add_argument("--batch-size", type=read_positive, help="instances per step")
    trial.add_argument("--optimizer", choices=["sgd", "adamw"], help="adamw is Adam where the recipe decays no weights")
    trial.add_argument("--hidden", type=read_sizes, help="sizes of the hidden layers of mnist, such as 512,128")
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every run has."""
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="where to publish (default: models)")
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
    parser.add_argument("--no-publish", action="store_true", help="do everything but publish, such as for a trial")
    parser.add_argument(
        "--force", action="store_true", help="publish also if the published version is better on validation"
    )


def build_own_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of `tabular` or `images`."""
    parser = argparse.ArgumentParser(prog=f"python -m training {command}")
    parser.add_argument("--name", help="of the model (default: the file's or folder's name)")
    if command == TABULAR:
        parser.description = "Train a model of your own table, and publish it. Column types are inferred."
        parser.add_argument("file", type=Path, help="CSV with a header, or Parquet")
        parser.add_argument("--target", required=True, metavar="COLUMN", help="what to predict")
        parser.add_argument(
            "--task", choices=["auto", "regression", "binary", "multiclass"], default="auto", help="(default: auto)"
        )
        parser.add_argument(
            "--model",
            choices=["auto", "linear", "mlp", "boosted"],
            default="auto",
            help="which kind to train (default: auto, all three; the best on validation is published)",
        )
        parser.add_argument("--exclude", default="", metavar="COLUMNS", help="not to be used, separated by commas")
        parser.add_argument(
            "--group", metavar="COLUMN", help="rows with the same value, as a customer's, stay together"
        )
        parser.add_argument("--time", metavar="COLUMN", help="train on the oldest rows, and test on the newest")
    else:
        parser.description = "Train a classifier of your own pictures, a folder for each class, and publish it."
        parser.add_argument("folder", type=Path, help="has a folder of pictures for each class")
        parser.add_argument("--size", type=read_positive, default=64, help="pixels a side that it sees (default: 64)")
        parser.add_argument("--mirror", action="store_true", help="pictures may be mirrored, as of things, not of text")
    add_run_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == [AUTOGRAD]:
        from training import autograd_tour  # noqa: PLC0415 - `--help` should not wait for torch

        autograd_tour.main()
        return 0
    is_own = bool(arguments) and arguments[0] in (TABULAR, IMAGES)
    parser = build_own_parser(arguments[0]) if is_own else build_parser()
    options = parser.parse_args(arguments[is_own:])
    try:
        signal.signal(signal.SIGTERM, _leave)
        if is_own:
            return _train([_build_own(arguments, options)], options)
        recipes = _choose_recipes(parser, options)
        return 0 if options.list else _train(recipes, options)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return INTERRUPTED


def _choose_recipes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> "list[Recipe]":
    """Return the recipes that were named, or list them all."""
    from training.recipes import load_recipes  # noqa: PLC0415 - `--help` should not wait for torch

    recipes = load_recipes(options.recipes_from)
    if options.list:
        for recipe in recipes.values():
            print(f"{recipe.name:18} {recipe.task:11} {recipe.title}")
        return []
    names = list(recipes) if options.all else options.recipes
    if not names:
        parser.error("name a recipe, or give --all or --list")
    unknown = [name for name in names if name not in recipes]
    if unknown:
        parser.error(f"unknown recipe {unknown[0]!r}; choose from {', '.join(recipes)}")
    if (changed := [name for name in TRIAL if getattr(options, name) is not None]) and not options.no_publish:
        parser.error(
            f"--{changed[0].replace('_', '-')} is for trials: add --no-publish, or write a recipe of your own"
            " (docs/your-own-recipe.md)"
        )
    return [recipes[name] for name in dict.fromkeys(names)]


def _build_own(arguments: list[str], options: argparse.Namespace) -> "Recipe":
    """Return the recipe of the user's table or pictures, after saying what was understood of them."""
    from service.packaging.package import choose_name  # noqa: PLC0415 - `--help` should not wait for torch
    from training import images, table, tabular  # noqa: PLC0415

    command = shlex.join(["python", "-m", "training", *arguments])
    if arguments[0] == IMAGES:
        name = options.name or choose_name(options.folder.resolve())
        return images.build_images_recipe(options.folder, name, options.size, options.mirror, command)
    excluded = tuple(part.strip() for part in options.exclude.split(",") if part.strip())
    said = table.TableOptions(options.file, options.target, options.task, excluded, options.group, options.time)
    ways = [way for way in tabular.WAYS if options.model == "auto" or way.startswith(options.model)]
    own = tabular.Tabular(said, table.load_table(said), tuple(ways))
    own.print_table()
    return own.build_recipe(options.name or choose_name(options.file), command)


def _train(recipes: "list[Recipe]", options: argparse.Namespace) -> int:
    """Run the recipes one after the other, and print where each was published."""
    from service.model.version_folder import load_manifest  # noqa: PLC0415 - `--help` should not wait for torch
    from training.run import Request, rehearse, run  # noqa: PLC0415

    request = Request(
        models_dir=options.models_dir,
        data_dir=getattr(options, "data_dir", Path("data")),
        seeds=tuple(options.seeds),
        epochs=options.epochs,
        device=options.device,
        version=options.version,
        force=options.force,
        changes={name: value for name in TRIAL if (value := getattr(options, name, None)) is not None},
    )
    for recipe in recipes:
        try:
            if options.no_publish:
                print(f"{recipe.name}: not published  {_summarize(rehearse(recipe, request))}", flush=True)
                continue
            folder = run(recipe, request)
        except KeyboardInterrupt:
            print(f"interrupted; {recipe.name} was not published", file=sys.stderr)
            return INTERRUPTED
        print(f"{recipe.name}: published {folder}  {_summarize(load_manifest(folder))}", flush=True)
    return 0


def _summarize(manifest: "Manifest") -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in manifest.metrics.items())


def _leave(_signal: int, _frame: object) -> None:
    """Turn SIGTERM into an exception, so that partial files are removed on the way out."""
    raise SystemExit(TERMINATED)


# --- Types of arguments -----------------------------------------------------------------------------------------------


def read_seeds(text: str) -> Sequence[int]:
    """Return the seeds of `0-3` or `1,5,9`, each once.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or more than 1,000 seeds.
    """
    first, dash, last = text.partition("-")
    parts = [first, last] if dash else text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= len(str(LARGEST))]
    if len(numbers) == len(parts):
        seeds = range(numbers[0], numbers[1] + 1) if dash else tuple(dict.fromkeys(numbers))
        if 0 < len(seeds) <= MOST_SEEDS and max(seeds) <= LARGEST:
            return seeds
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-3 or 1,5,9")


def read_positive(text: str) -> int:
    """Return a positive integer.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {LARGEST}")
    return int(text)


def read_sizes(text: str) -> tuple[int, ...]:
    """Return the sizes of `512,128`; the empty text is no layer.

    Raises:
        argparse.ArgumentTypeError: one is not a positive integer.
    """
    return tuple(read_positive(part) for part in text.split(",")) if text else ()


def read_rate(text: str) -> float:
    """Return a positive number.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return rate


if __name__ == "__main__":
    sys.exit(main())
