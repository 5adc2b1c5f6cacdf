"""The card's tables and figures are formatted well, and every recipe has its own prose."""

from training.about import ABOUT
from training.card import show, table
from training.recipes import RECIPES


def test_every_recipe_has_its_words() -> None:
    """Purpose, limits and data are described for exactly the recipes there are."""
    assert set(ABOUT) == set(RECIPES)


def test_table() -> None:
    """It has headings, a rule and rows."""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_figures_are_said_as_readers_want_them() -> None:
    """Accuracies are in percent, losses have four digits."""
    assert show("accuracy", 0.99748) == "99.75 %"
    assert show("ece", 0.0012) == "0.12 %"
    assert show("loss", 0.0123456) == "0.01235"
