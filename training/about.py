"""What a model's card says that no figure can: what the model is for, what it is not, and whose data taught it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """`purpose` and `limits` are sentences; `data` names the source and its licence."""

    purpose: str
    limits: str
    data: str


_DRAWN = "Drawn from a formula by `training/data.py`; there is nothing to license."
_MNIST = (
    "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist), digits of about 500 American"
    " census workers and high-school students, CC BY-SA 3.0: 55,000 pictures train, 5,000 held out of the training set"
    " choose epoch, temperature and seed. A run reads the 10,000 of the test set at its end and chooses nothing by"
    " them; which earlier trials had looked at them stands in docs/training-log.md."
)
_DIGITS_LIMITS = (
    "It knows ten digits, one to a picture: letters, several digits and scribbles are given a digit too, at times a"
    " sure one. Pictures must be prepared as MNIST's were, which the service does with PNG and JPEG files."
)
_LINE = (
    "The first example of a model that gives a number. It shows that gradient descent ends at the least squares line."
)
_LINE_LIMITS = "Outside the range of its training points the line goes on, whatever the truth may be."

ABOUT: dict[str, About] = {
    "logistic-by-hand": About(
        "An example of a binary classifier on two features, and of what training is without any library's help.",
        "The rule behind its data is known; nobody needs a model of it.",
        _DRAWN,
    ),
    "logistic-hours": About(
        "The smallest binary classifier there can be, for first requests and for the lesson of a summed loss.",
        "Three students say nothing about a fourth. Its probabilities are a matter of when training stopped.",
        "Three numbers of a tutorial; there is nothing to license.",
    ),
    "logistic-clusters": About(
        "An example of a binary classifier whose classes overlap, so that it must be wrong at times and can say so.",
        "Far from both clouds its answers are sure and mean nothing.",
        _DRAWN,
    ),
    "linear-by-hand": About(_LINE, _LINE_LIMITS, _DRAWN.replace("training/data.py", "sklearn.make_regression")),
    "linear": About(_LINE, _LINE_LIMITS, _DRAWN.replace("training/data.py", "sklearn.make_regression")),
    "mnist": About(
        "Reading single handwritten digits, as a tutorial's perceptron does: the baseline of the two others.",
        f"{_DIGITS_LIMITS} It has seen no digit that was not MNIST's: for pictures from elsewhere take `mnist-cnn`.",
        _MNIST,
    ),
    "mnist-mlp-best": About(
        "Reading single handwritten digits with few and simple operations: two products of matrices and a third.",
        _DIGITS_LIMITS,
        _MNIST,
    ),
    "mnist-cnn": About(
        "Reading single handwritten digits as well as it is done here; the one to take for pictures from elsewhere.",
        _DIGITS_LIMITS,
        _MNIST,
    ),
}
