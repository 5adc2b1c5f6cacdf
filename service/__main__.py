"""The command line, `python -m service`: serve models and manage the models folder."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from service import __version__
from service.cli import commands
from service.cli.sign import sign
from service.errors import ServiceError
from service.settings import add_flags, load_settings


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(prog="python -m service", description="Serve models from a folder over HTTP.")
    parser.add_argument("--version", action="version", version=__version__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    serve = actions.add_parser(
        "serve", help="serve the models in a folder", description="Serve the models in a folder."
    )
    add_flags(serve)
    serve.set_defaults(run=commands.serve)

    verify = actions.add_parser("verify", help="re-check every digest, golden sample and parity, and print a table")
    add_flags(verify, ["models_dir", "device"])
    verify.set_defaults(run=commands.verify)

    predict = actions.add_parser("predict", help="predict offline, by the same code as the service")
    predict.add_argument("model", help="name of a model, or name/version")
    predict.add_argument("--input", required=True, metavar="FILE", help='file with {"instances": …}; - for stdin')
    add_flags(predict, ["models_dir", "device", "backend"])
    predict.set_defaults(run=commands.predict)

    models = actions.add_parser("models", help="see and change what a running service serves")
    models.add_argument("what", choices=["list", "load", "unload", "rollback"])
    models.add_argument("model", nargs="?", help="name of a model; not for list")
    models.add_argument("--to", metavar="VERSION", help="version to roll back to; default: the one before the latest")
    models.add_argument("--url", default="", help="where the service is; default: http://127.0.0.1 and its port")
    add_flags(models, ["port", "api_key", "admin_key"])
    models.set_defaults(run=commands.models)

    signing = actions.add_parser("sign", help="sign a version, for services that run with --require-signature")
    signing.add_argument("folder", metavar="VERSION_FOLDER", help="models/<name>/<version>")
    signing.add_argument(
        "--key", required=True, metavar="FILE", help="private key (PEM, ECDSA on P-256, P-384 or P-521)"
    )
    signing.set_defaults(run=sign)

    _add_package(actions.add_parser("package", help="put a model of your own into the folder, with a manifest"))
    return parser


def _add_package(package: argparse.ArgumentParser) -> None:
    package.add_argument(
        "artifacts",
        nargs="+",
        metavar="FILE",
        help="model.onnx, model.pt or both; or one that is converted: a pickle of scikit-learn, XGBoost's .json or"
        " .ubj, LightGBM's .txt, or torch.export's .pt2",
    )
    package.add_argument("--name", help="lower-case letters, digits, - and _; default: the file's name")
    package.add_argument(
        "--task",
        choices=["regression", "binary", "multiclass", "outputs", "tensors"],
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
    package.add_argument("--trust-pickle", action="store_true", help="read a pickle or .pt2, which can run code in it")
    package.add_argument("--threshold", type=float, help="for binary models; 0.5 where not given")
    package.add_argument(
        "--output-kind",
        choices=["value", "probability", "probabilities", "logits"],
        help="what the graph's output is; default: value, probability or probabilities by task",
    )
    package.add_argument("--input-tensor", metavar="NAME", help="the ONNX graph's input, where it has several")
    package.add_argument("--output-tensor", metavar="NAME", help="the ONNX graph's output, where it has several")
    add_flags(package, ["models_dir"])
    package.set_defaults(run=commands.package)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for success, 1 for an error (one line on stderr), 130 for Ctrl-C.

    argparse exits with 2 if the command line is invalid.
    """
    flags = vars(build_parser().parse_args(arguments))
    try:
        code = int(flags["run"](load_settings(flags), flags))
        sys.stdout.flush()  # flush here so that BrokenPipeError can be caught
        return code
    except BrokenPipeError:  # stdout was closed, as in `verify | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        return 1
    except ServiceError as error:
        logging.getLogger("service").debug("", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
