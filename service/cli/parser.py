"""The command line's parser: commands, flags, and suggestions for what was mistyped."""

import argparse
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from service import __version__
from service.cli import commands
from service.cli.completion import write_completion
from service.cli.demo import init
from service.cli.sign import sign
from service.settings import Settings, add_flags

Run = Callable[[Settings, dict[str, Any]], int]
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the closest name there is.

    Attributes:
        flags: Every flag that was added.
        commands: The parsers of its commands by name.
    """

    def __init__(self, *given: Any, **more: Any) -> None:  # noqa: ANN401 - argparse's own
        self.flags: list[str] = []
        self.commands: dict[str, Parser] = {}
        super().__init__(*given, **more)

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:  # noqa: ANN401 - argparse's own
        """Add an argument, and remember its flags."""
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **more)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        found = _CHOICE.search(message)
        if found:
            names = re.findall(r"[a-z][\w-]*", found[2])
            message = f"there is no {found[1]!r} here; there are {', '.join(names)}{suggest(found[1], names)}"
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def suggest(given: str, names: Sequence[str]) -> str:
    """Return a question that names the closest of some names, or the empty string."""
    close = get_close_matches(given, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse(arguments: Sequence[str] | None, program: str) -> dict[str, Any]:
    """Return the command's flags; exit with 2 if the command line is invalid."""
    parser = build_parser(program)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = parser.commands[options.action]
        own.error(f"{own.prog} takes no {unknown[0]}{suggest(unknown[0].partition('=')[0], own.flags)}")
    return vars(options)


def build_parser(program: str = "model-service") -> Parser:
    """Build the command-line parser of a program by that name."""
    parser = Parser(prog=program, description="Serve models from a folder over HTTP.")
    parser.add_argument("--version", action="version", version=__version__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    def add(name: str, run: Run, about: str) -> Parser:
        found = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        found.set_defaults(run=run)
        parser.commands[name] = found
        return found

    serve = add("serve", commands.serve, "serve the models in a folder")
    serve.add_argument("--demo", action="store_true", help="serve two small models that are installed with the service")
    add_flags(serve)
    _add_init(add("init", init, "make a models folder with one example"))
    add_flags(
        add("verify", commands.verify, "re-check every digest, golden sample and parity, and print a table"),
        ["models_dir", "device"],
    )
    predict = add("predict", commands.predict, "predict offline, by the same code as the service")
    predict.add_argument("model", help="name of a model, or name/version")
    predict.add_argument("--input", required=True, metavar="FILE", help='file with {"instances": …}; - for stdin')
    add_flags(predict, ["models_dir", "device", "backend"])
    _add_models(add("models", commands.models, "see and change what a running service serves"))
    signing = add("sign", sign, "sign a version, for services that run with --require-signature")
    signing.add_argument("folder", metavar="VERSION_FOLDER", help="models/<name>/<version>")
    signing.add_argument(
        "--key", required=True, metavar="FILE", help="private key (PEM, ECDSA on P-256, P-384 or P-521)"
    )
    _add_package(add("package", commands.package, "put a model of your own into the folder, with a manifest"))
    add("completion", lambda *_: write_completion(parser), "print a script that completes commands and flags in bash")
    return parser


def _add_init(init_parser: Parser) -> None:
    init_parser.add_argument("folder", nargs="?", default="models", help="folder to make (default: models)")


def _add_models(models: Parser) -> None:
    models.add_argument("what", choices=["list", "load", "unload", "rollback"], help="what to do")
    models.add_argument("model", nargs="?", help="name of a model; not for list")
    models.add_argument("--to", metavar="VERSION", help="version to roll back to; default: the one before the latest")
    models.add_argument("--url", default="", help="where the service is; default: http://127.0.0.1 and its port")
    helps = {
        "port": "port of the service, on this machine",
        "api_key": "key to send, if the service asks for one",
        "admin_key": "key to send for load, unload and rollback, if the service has one",
    }
    add_flags(models, list(helps), helps)


def _add_package(package: Parser) -> None:
    package.add_argument(
        "artifacts",
        nargs="+",
        metavar="FILE",
        help="model.onnx, model.pt, model.pt2 or several of them; or one that is converted: torch.export's .pt2 alone,"
        " XGBoost's .json or .ubj, LightGBM's .txt, or a pickle of scikit-learn",
    )
    package.add_argument("--name", help="lower-case letters, digits, - and _; default: the file's name")
    package.add_argument(
        "--task",
        choices=["regression", "binary", "multiclass", "multilabel", "outputs", "tensors"],
        help="what the graph predicts; default: as understood from it",
    )
    package.add_argument("--model-version", type=int, metavar="N", help="default: the next free one")
    package.add_argument("--title", default="", help="one line for people")
    package.add_argument("--description", default="", help="a sentence or two for people")
    package.add_argument("--features", metavar="A,B,…", help="names of the columns of a tabular model, in order")
    package.add_argument(
        "--samples",
        metavar="FILE",
        help="real inputs, CSV (with a header or without), .parquet or .npy: ranges, types, golden samples, names",
    )
    package.add_argument("--image", metavar="WxH[xC]", help="size of the pictures of an image model")
    package.add_argument("--input-shape", metavar="D1,D2,…", help="shape of one picture's tensor, if not C,H,W")
    package.add_argument(
        "--polarity",
        choices=["light-on-dark", "dark-on-light", "as-is"],
        help="of an image model's ink, to which pictures are turned; as-is (default): pictures are not ink on paper",
    )
    package.add_argument(
        "--fitting",
        choices=["stretch", "mnist"],
        help="of a picture to the size: stretch (default), or mnist: its ink scaled and centred as MNIST's",
    )
    package.add_argument("--labels", metavar="A,B,…|@FILE", help="class labels in index order; a file has one a line")
    package.add_argument("--values", metavar="A,B,…", help="names of a regression's values, where it has several")
    package.add_argument("--mean", metavar="R,G,B", help="written into the graph: subtracted from each channel first")
    package.add_argument("--std", metavar="R,G,B", help="written into the graph: each channel is then divided by it")
    package.add_argument("--trust-pickle", action="store_true", help="read a pickle, which can run code that is in it")
    package.add_argument("--threshold", type=float, help="for binary models; 0.5 where not given")
    package.add_argument(
        "--output-kind",
        choices=["value", "probability", "probabilities", "logits"],
        help="what the graph's output is; default: value, probability or probabilities by task",
    )
    package.add_argument("--input-tensor", metavar="NAME", help="the ONNX graph's input, where it has several")
    package.add_argument("--output-tensor", metavar="NAME", help="the ONNX graph's output, where it has several")
    add_flags(package, ["models_dir"])
