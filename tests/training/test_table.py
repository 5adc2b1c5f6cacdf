"""A user's table: the types of its columns, its target, and splits that do not leak."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.model.columns import count_days
from service.model.manifest import Column
from tests.training.tables import make_customers, write_rows
from training.errors import DataError
from training.table import (
    TableOptions,
    UserTable,
    choose_column,
    encode,
    load_table,
    read_target,
    split_by_group,
    split_by_time,
)


def load(tmp_path: Path, names: list[str], rows: list[list[Any]], target: str, **options: Any) -> UserTable:
    """Return a table of rows."""
    file = tmp_path / "table.csv"
    write_rows(file, names, rows)
    return load_table(TableOptions(file, target, **options))


@pytest.mark.parametrize(
    ("cells", "kind", "nullable"),
    [
        (["1", "2", "2"], "integer", False),
        (["1", "", "5"], "integer", True),
        (["1.5", "2", "inf"], "number", True),
        (["true", "False", ""], "boolean", True),
        (["2024-01-31", "2024-02-01T12:30:00Z", "2024-02-02"], "datetime", False),
        (["a", "b", "a", "b"], "category", False),
    ],
)
def test_types_are_inferred(cells: list[str], kind: str, nullable: bool) -> None:
    """Numbers, booleans, dates and categories are told apart, and gaps are allowed where there are some."""
    column = choose_column("x", cells)
    assert isinstance(column, Column)
    assert (column.type, column.nullable) == (kind, nullable)


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (["4", "4", "4"], "every row has the same value"),
        (["", "", ""], "every row has the same value"),
        (["3", "1", "2"], "it numbers the rows"),
        (["one remark", "another", "a third"], "it is text with 3 different values"),
    ],
)
def test_useless_columns_are_left_out(cells: list[str], why: str) -> None:
    """Constants, row numbers and free text are not used."""
    assert choose_column("x", cells) == why


def test_cells_become_numbers_as_in_the_service() -> None:
    """A category is its index, a date its days, a boolean 0 or 1, and a gap NaN."""
    category = Column(name="c", type="category", values=("a", "b"), nullable=True)
    assert np.array_equal(encode(category, ["b", "", "a"]), [1, np.nan, 0], equal_nan=True)
    assert encode(Column(name="d", type="datetime"), ["1970-01-02T12:00"]).tolist() == [count_days("1970-01-02T12:00")]
    assert encode(Column(name="e", type="boolean"), ["true", "False"]).tolist() == [1, 0]
    assert np.array_equal(encode(Column(name="f", type="number"), ["inf", "2.5"]), [np.nan, 2.5], equal_nan=True)


@pytest.mark.parametrize(
    ("cells", "task", "labels"),
    [
        (["yes", "no"] * 20, "binary", ("no", "yes")),
        (["1", "0"] * 20, "binary", ("0", "1")),
        (["10", "9", "2"] * 20, "multiclass", ("2", "9", "10")),
        ([str(number) for number in range(60)], "regression", ()),
        (["1.5", "2.5", "3.5"] * 20, "regression", ()),
    ],
)
def test_task_is_inferred(cells: list[str], task: str, labels: tuple[str, ...]) -> None:
    """Texts, two values and few whole numbers are classes; other numbers are values."""
    assert read_target(cells, TableOptions(Path("t.csv"), "t"))[:2] == (task, labels)


def test_splits_share_no_row(tmp_path: Path) -> None:
    """Rows that were copied are in one split, with each class in the same shares."""
    random = np.random.default_rng(0)
    rows = [[*random.normal(size=3).round(3).tolist(), int(index % 4 == 0)] for index in range(300)]
    table = load(tmp_path, ["a", "b", "c", "y"], rows + rows[:100], "y")
    splits = table.splits
    assert splits.validation is not None
    seen = [{row.tobytes() for row in each.inputs.numpy()} for each in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert abs(splits.test.targets.mean().item() - 0.25) < 0.05
    assert 0.15 < len(splits.test) / 400 < 0.25


def test_groups_and_times_are_not_split() -> None:
    """A group is in one split; the newest rows test, and equal times stay together."""
    groups = np.random.default_rng(0).integers(0, 50, 1000)
    parts = split_by_group(groups, np.zeros(1000))
    assert all(len(set(parts[groups == group])) == 1 for group in range(50))
    assert set(parts) == {0, 1, 2}
    times = np.repeat(np.arange(100.0), 10)
    parts = split_by_time(np.random.default_rng(0).permutation(times))
    assert np.bincount(parts).tolist() == [640, 160, 200]
    ordered = split_by_time(times)
    assert (np.diff(ordered) >= 0).all()


def test_group_and_time_are_no_features(tmp_path: Path) -> None:
    """The columns that split are left out, and so are those that the user excludes."""
    names, rows = make_customers(400)
    table = load(tmp_path, names, rows, "churn", group="city", exclude=("plan",))
    assert [column.name for column in table.columns] == ["age", "spent", "member", "signed"]
    assert table.left_out["city"] == "group"
    assert table.left_out["plan"] == "excluded"
    table = load(tmp_path, names, rows, "churn", time="signed")
    assert table.left_out["signed"] == "time"


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ("gone", {}, "has no column 'gone'"),
        ("churn", {"exclude": ("nothing",)}, "has no column 'nothing'"),
        ("churn", {"task": "regression"}, "churn is not numbers, which --task regression predicts"),
        ("churn", {"task": "multiclass"}, "churn has 2 different values, which is --task binary"),
        ("churn", {"time": "plan"}, "--time plan needs a number or a date"),
        ("remark", {}, "remark has 120 different values, too many"),
    ],
)
def test_refusals_say_what_to_do(change: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """What cannot be learned from is refused in one sentence."""
    names, rows = make_customers(120)
    with pytest.raises(DataError, match=sentence):
        load(tmp_path, names, rows, change, **options)


def test_few_rows_are_refused(tmp_path: Path) -> None:
    """A handful of rows, or of one class, is not enough."""
    with pytest.raises(DataError, match="has 10 rows with y; at least 30 are needed"):
        load(tmp_path, ["x", "y"], [[index / 3, index % 2] for index in range(10)], "y")
    with pytest.raises(DataError, match="class '1' has 2 rows; at least 5 are needed"):
        load(tmp_path, ["x", "y"], [[index / 3, int(index < 2)] for index in range(40)], "y")


def test_parquet_is_read(tmp_path: Path) -> None:
    """A Parquet file is the same table as its CSV."""
    pandas = pytest.importorskip("pandas")
    names, rows = make_customers(200)
    file = tmp_path / "table.csv"
    write_rows(file, names, rows)
    pandas.read_csv(file).to_parquet(tmp_path / "table.parquet")
    plain, parquet = (load_table(TableOptions(tmp_path / f"table.{kind}", "churn")) for kind in ("csv", "parquet"))
    assert [each.name for each in plain.columns] == [each.name for each in parquet.columns]
    assert plain.splits.train.digest() == parquet.splits.train.digest()
