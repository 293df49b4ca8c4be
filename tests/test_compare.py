"""What benchmarks/compare.py makes of its arguments."""

import importlib.util
import sys

import pytest
from checkout import ROOT

SPEC = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
assert SPEC is not None
assert SPEC.loader is not None
compare = importlib.util.module_from_spec(SPEC)
sys.modules["compare"] = compare  # where its dataclasses look for their module
SPEC.loader.exec_module(compare)


def test_rounds_of_tests_and_loads() -> None:
    loads, tests = compare.parse_tests("load:3,pp512,tg32x4:1,tg16@d2000:2", 5)
    assert loads == 3
    assert tests == {
        "pp512": (compare.Test(512, 0, 1, 0), 5),
        "tg32x4": (compare.Test(0, 32, 4, 0), 1),
        "tg16@d2000": (compare.Test(0, 16, 1, 2000), 2),
    }
    assert compare.parse_tests("load,pp512", 5)[0] == 5
    assert compare.parse_tests("pp512", 5)[0] == 0


def test_an_unknown_test_is_refused() -> None:
    with pytest.raises(SystemExit, match="pp512"):
        compare.parse_tests("pp", 5)
