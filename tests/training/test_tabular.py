"""A model of the user's own table: from CSV to answers over HTTP that are the trained pipeline's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import nn

from service.model.version_folder import load_manifest
from tests.servers import Server
from tests.training.tables import make_customers, write_rows, write_shipped
from training.__main__ import main
from training.data import Splits
from training.run import Request, run
from training.table import TableOptions, encode, load_table
from training.tabular import Tabular, join_splits, measure_baseline
from training.trainer import Fitted, Settings, measure_outputs

WAYS = ("mlp", "boosted")
NAMES, ROWS = make_customers(1400)
CPU = torch.device("cpu")


def train(file: Path, root: Path, way: str) -> nn.Module:
    """Train one way, publish it under its name, and return its net."""
    options = TableOptions(file, "churn")
    own = Tabular(options, load_table(options), (way,))
    recipe, nets = own.build_recipe(way, "train"), list[nn.Module]()

    def fit(splits: Splits, settings: Settings) -> Fitted:
        fitted = own.fit(splits, settings)
        nets.append(fitted.net)
        return fitted

    run(replace(recipe, fit=fit), Request(models_dir=root, epochs=4))
    return nets[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, dict[str, nn.Module]]]:
    """A server of two models of the customers, the table, and the nets that were exported."""
    root = tmp_path_factory.mktemp("tabular")
    file = root / "customers.csv"
    write_rows(file, NAMES, ROWS)
    nets = {way: train(file, root / "models", way) for way in WAYS}
    with Server(root / "models", "--workers", "1") as server:
        yield server, root / "models", nets


def as_instance(row: list[Any]) -> dict[str, Any]:
    """Return a row of the CSV file as a client would send it."""
    named = dict(zip(NAMES, row, strict=True))
    age = None if named["age"] == "" else float(named["age"])
    plan = named["plan"] or None
    spent, member = float(named["spent"]), named["member"] == "true"
    return {
        "age": age,
        "spent": spent,
        "plan": plan,
        "city": named["city"],
        "member": member,
        "signed": named["signed"],
    }


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_trained_pipeline(way: str, served: tuple[Server, Path, dict[str, nn.Module]]) -> None:
    """Columns in, probabilities out, equal to what the net (and scikit-learn in it) gives for the same rows."""
    server, root, nets = served
    manifest = load_manifest(root / way / "1")
    assert manifest.input.kind == "columns"
    assert [column.type for column in manifest.input.columns] == [
        "number", "number", "category", "category", "boolean", "datetime"
    ]  # fmt: skip
    asked = ROWS[:50]
    response = server.predict(way, [as_instance(row) for row in asked])
    assert response.status_code == 200, response.text
    answers = [each["probability"] for each in response.json()["predictions"]]
    cells = {name: [str(row[index]) for row in asked] for index, name in enumerate(NAMES)}
    inputs = np.stack([encode(column, cells[column.name]) for column in manifest.input.columns], axis=1)
    with torch.no_grad():
        expected = torch.sigmoid(nets[way](torch.from_numpy(inputs.astype(np.float32)))).reshape(-1)
    assert np.allclose(answers, expected.numpy(), atol=1e-4)
    refused = server.predict(way, [as_instance(ROWS[0]) | {"city": "city99"}])
    assert refused.status_code == 400
    assert "city" in refused.json()["error"]


def test_card_has_baseline_importance_and_warnings(served: tuple[Server, Path, dict[str, nn.Module]]) -> None:
    """The card says what the prediction rests on, what always saying the commonest class gives, and what to look at."""
    _, root, _ = served
    card = (root / "boosted" / "1" / "README.md").read_text()
    for part in ("## Warnings", "## Comparison", "## Columns", "commonest class is right in", "importance.png"):
        assert part in card
    assert "- rows have dates: `--time signed`" in card
    assert "`id` (it numbers the rows); `remark` (it is text with" in card
    rises = {line.split("`")[1]: float(line.split("|")[3]) for line in card.splitlines() if line.startswith("| `")}
    assert next(iter(rises)) in ("signed", "plan", "age")
    assert min(rises.values()) > -0.05


def test_command_says_what_it_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line trains what it is told to, and prints types, left-out columns and warnings."""
    file = tmp_path / "Customers 2024.csv"
    write_rows(file, [*NAMES, "left_on"], [[*row, 1.5 if row[-1] == "yes" else 0.5] for row in ROWS[:300]])
    told = ["tabular", str(file), "--target", "churn", "--model", "linear", "--epochs", "2", "--exclude", "city"]
    assert main([*told, "--models-dir", str(tmp_path / "models"), "--no-publish"]) == 0
    printed = capsys.readouterr()
    assert "churn: binary, no, yes" in printed.out
    assert "  plan: category or missing: basic, plus, pro" in printed.out
    assert "  city: not used, excluded" in printed.out
    assert "customers-2024: not published  accuracy" in printed.out
    assert "warning: leak suspected: `left_on` alone gives the right class in 100.0%" in printed.err
    assert main(["tabular", str(tmp_path / "none.csv"), "--target", "churn"]) == 1
    assert "none.csv cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_planted_leak_is_warned_of(noise: float, tmp_path: Path) -> None:
    """A column that nearly is the target is named; the honest ones are not."""
    random = np.random.default_rng(0)
    rows = [[*row[:-1], row[-1] if random.random() >= noise else "no", row[-1]] for row in ROWS[:600]]
    file = tmp_path / "leak.csv"
    write_rows(file, [*NAMES[:-1], "cancelled", "churn"], rows)
    options = TableOptions(file, "churn")
    warnings = Tabular(options, load_table(options)).list_warnings()
    assert [each for each in warnings if "leak" in each and "`cancelled` alone" in each]
    assert sum("leak" in each for each in warnings) == 1


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "diabetes", "iris"])
def test_honest_tables_are_not_suspected(name: str, tmp_path: Path) -> None:
    """No column of scikit-learn's sets is taken for a leak."""
    file = tmp_path / f"{name}.csv"
    write_shipped(name, file)
    options = TableOptions(file, "target")
    assert not [each for each in Tabular(options, load_table(options)).list_warnings() if "leak" in each]


def test_imbalance_and_few_rows_are_warned_of(tmp_path: Path) -> None:
    """A rare class is named, and too few rows are counted."""
    rows = [[index * 0.37 % 5, int(index % 17 == 0)] for index in range(150)]
    file = tmp_path / "rare.csv"
    write_rows(file, ["x", "y"], rows)
    options = TableOptions(file, "y")
    warnings = " ".join(Tabular(options, load_table(options)).list_warnings())
    assert "class imbalance: `1` is" in warnings
    assert "too few rows" in warnings


def test_small_table_is_cross_validated(tmp_path: Path) -> None:
    """On the diabetes set the chosen model is at least as good as scikit-learn's default boosting on the same rows."""
    file = tmp_path / "diabetes.csv"
    write_shipped("diabetes", file)
    options = TableOptions(file, "target")
    own = Tabular(options, load_table(options), ("linear", "boosted"))
    torch.manual_seed(0)
    fitted = own.fit(own.table.splits, Settings(20, CPU))
    test, whole = own.table.splits.test, join_splits(own.table.splits)
    with torch.no_grad():
        ours = measure_outputs(fitted.net(test.inputs), test.targets, "regression").loss
    plain = HistGradientBoostingRegressor(random_state=0).fit(whole.inputs.numpy(), whole.targets[:, 0].numpy())
    theirs = float(np.mean((plain.predict(test.inputs.numpy()) - test.targets[:, 0].numpy()) ** 2))
    assert ours < 1.01 * theirs
    assert ours < measure_baseline(own.table.splits, "regression", 0)["baseline_mse"]
    assert set(own.scores) == {"linear", "boosted"}
