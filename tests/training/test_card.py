"""The card's tables and figures are formatted well."""

from training.card import show, table


def test_table() -> None:
    """It has headings, a rule and rows."""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_figures_are_said_as_readers_want_them() -> None:
    """Accuracies are in percent, losses have four digits."""
    assert show("accuracy", 0.99748) == "99.75 %"
    assert show("ece", 0.0012) == "0.12 %"
    assert show("loss", 0.0123456) == "0.01235"
