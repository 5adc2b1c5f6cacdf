"""The manifest describes the data, the net and the checkout."""

from pathlib import Path

import pytest

from training import describe as module
from training.recipe import Recipe
from training.recipes import RECIPES


def test_ranges_are_those_of_the_training_data() -> None:
    """Feature ranges contain every training point and are integers."""
    recipe: Recipe = RECIPES["logistic-by-hand"]
    train = recipe.load(Path()).train
    described = module.add_ranges(recipe.input, train)
    assert described.kind == "tabular"
    for column, feature in enumerate(described.features):
        assert feature.minimum is not None
        assert feature.maximum is not None
        assert feature.minimum <= train.inputs[:, column].min() <= train.inputs[:, column].max() <= feature.maximum
        assert feature.minimum == int(feature.minimum)


@pytest.mark.parametrize(
    ("status", "head", "commit"),
    [("", "abc", "abc"), (" M training/run.py", "abc", None), (None, None, None), ("", None, None)],
)
def test_commit_is_that_of_the_code(
    status: str | None, head: str | None, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is recorded only if the code does not differ from it."""
    monkeypatch.setattr(module, "_git", lambda _, command, *__: status if command == "status" else head)
    assert module.find_commit() == commit
