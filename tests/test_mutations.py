"""benchmarks/mutations.py, which takes minutes, can still do what its table says, and its stored result is of that table."""

import ast
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from mutations import MUTATIONS, RESULT, mutated  # noqa: E402


def test_every_mutation_applies():
    sources = {file: (ROOT / file).read_text() for file in {mutation[0] for mutation in MUTATIONS}}
    assert len(MUTATIONS) == len(set(MUTATIONS)) >= 40
    for file, function, tests, old, new in MUTATIONS:
        assert mutated(sources[file], function, old, new) != sources[file]
        assert (ROOT / tests.split(" -k ")[0]).is_file()


def test_what_does_not_apply_is_refused():
    source = 'def f(x):\n    """x + 1"""\n    return x + 1 + x + 1\n\n\nclass A:\n    def f(self, x):\n        return x + 1\n'
    assert mutated(source, "A.f", "x + 1", "x - 1").count("x - 1") == 1
    for function, old in (("f", "x + 1"), ("f", "x + 2"), ("g", "x"), ("A.g", "x")):
        with pytest.raises(ValueError):
            mutated(source, function, old, "y")
    ast.parse(mutated(source, "f", "return", "yield"))


def test_stored_result():
    stored = json.loads(RESULT.read_text())
    assert {(row["file"], row["function"], row["old"], row["new"]) for row in stored} == {(*m[:2], *m[3:]) for m in MUTATIONS}
    assert all(row["caught_by"] for row in stored)
