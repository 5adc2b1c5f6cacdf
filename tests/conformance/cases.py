"""Every case: those that concern smuggling, and the rest."""

from tests.conformance import exchanges, framing

GROUPS = {"smuggling": framing.SMUGGLING, "the rest": exchanges.OTHER}
CASES = [case for cases in GROUPS.values() for case in cases]
