"""The card says what the run found, in tables, and every recipe has words of its own."""

from training.about import ABOUT
from training.card import say, table
from training.recipes import RECIPES


def test_every_recipe_has_its_words() -> None:
    """What a model is for, its limits and its data are said for each recipe, and for no other."""
    assert set(ABOUT) == set(RECIPES)


def test_table() -> None:
    """Heads, a rule and rows."""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_figures_are_said_as_readers_want_them() -> None:
    """Shares in percent, losses in four digits."""
    assert say("accuracy", 0.99748) == "99.75 %"
    assert say("ece", 0.0012) == "0.12 %"
    assert say("loss", 0.0123456) == "0.01235"
