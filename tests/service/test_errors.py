"""Tests of service.errors."""

import inspect
import re

from service import errors
from service.errors import ServiceError


def test_tree_in_docstring_is_complete() -> None:
    """The module's docstring names every error, at its depth in the class tree, with the status it is answered with."""
    drawn: dict[str, tuple[str, int | None]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([│ ]*[├└]── )?(\w+Error)\b\s*(.*)", line)
        if match:
            depth = len(match[1] or "") // 4
            parents[depth:] = [match[2]]
            status = int(match[3][:3]) if match[3][:3].isdigit() else None
            drawn[match[2]] = (parents[depth - 1] if depth else "Exception", status)
    real = {
        name: (found.__mro__[1].__name__, int(found.status))
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, ServiceError)
    }
    assert list(drawn) == list(real)
    for name, (parent, status) in drawn.items():
        assert parent == real[name][0]
        assert status is None or status == real[name][1]


def test_every_error_has_a_docstring() -> None:
    """Every error says in its docstring when it happens."""
    found = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, ServiceError)]
    assert all(value.__doc__ for value in found)
