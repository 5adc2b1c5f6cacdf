"""Every input that fuzzing by coverage has kept, once more; `make fuzz` looks for new ones."""

import pytest

from tests.fuzz.by_coverage import NAMES, load_corpus
from tests.fuzz.targets import TARGETS


def test_every_target_is_named() -> None:
    """The names, which the fuzzer's parent needs without its imports, are those of the targets."""
    assert tuple(TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_keep_the_promises(name: str) -> None:
    """No input that was ever worth keeping breaks what its target promises."""
    inputs = load_corpus(name)
    assert inputs
    for data in inputs:
        TARGETS[name](data)
