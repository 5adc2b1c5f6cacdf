"""Tables that packages ship, and a made one, as CSV files."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets

SHIPPED = ("breast_cancer", "wine", "diabetes", "digits")


def write_shipped(name: str, file: Path) -> None:
    """Write one of scikit-learn's sets; classes are texts, the target is the last column."""
    loaded: Any = getattr(datasets, f"load_{name}")()
    names = [str(each).replace(" ", "_") for each in loaded.feature_names]
    targets = loaded.target.tolist()
    if name in ("breast_cancer", "wine"):
        targets = [str(loaded.target_names[each]) for each in targets]
    write_rows(
        file, [*names, "target"], [[*row, target] for row, target in zip(loaded.data.tolist(), targets, strict=True)]
    )


def write_rows(file: Path, names: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV file with a header."""
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([names, *rows])


def make_customers(count: int) -> tuple[list[str], list[list[Any]]]:
    """Return names and rows of customers who stay or leave: categories, dates, gaps, a row number and free text."""
    random = np.random.default_rng(0)
    plans, cities = ("basic", "plus", "pro"), [f"city{index}" for index in range(25)]
    rows = []
    for number in range(count):
        plan, city = random.integers(3), random.integers(25)
        age, spent = random.normal(45, 14), random.lognormal(3, 0.8)
        day, is_member = int(random.integers(0, 1400)), bool(random.integers(2))
        signed = np.datetime64("2021-01-01") + day
        logit = 1.2 * (plan == 0) - 0.9 * is_member + 0.02 * (city % 7) ** 2 + 1.1 * np.sin(day / 365.25 * 2 * np.pi)
        logit += 0.9 * np.sin(age / 6) - 0.02 * spent - 0.2
        leaves = random.random() < 1 / (1 + np.exp(-2 * logit))
        rows.append([
            number + 1,
            "" if random.random() < 0.15 else f"{age:.1f}",
            f"{spent:.2f}",
            plans[plan] if random.random() > 0.1 else "",
            cities[city],
            str(is_member).lower(),
            str(signed),
            f"remark {random.integers(10**9)}",
            "yes" if leaves else "no",
        ])  # fmt: skip
    return ["id", "age", "spent", "plan", "city", "member", "signed", "remark", "churn"], rows
