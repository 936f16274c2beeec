"""benchmarks/mutations.py, which takes minutes: its table fits the code and the tests, and its stored result
is of that table."""

import ast
import json
import re

import pytest

from conftest import ROOT
from mutations import CHEAP_FIRST, MUTATIONS, RESULT, mutate


def test_every_mutation_applies():
    sources = {file: (ROOT / file).read_text() for file in {mutation[0] for mutation in MUTATIONS}}
    test_files = {file: (ROOT / file).read_text() for file in CHEAP_FIRST}
    assert len(MUTATIONS) == len(set(MUTATIONS)) >= 40
    for file, function, tests, old, new in MUTATIONS:
        mutated = mutate(sources[file], function, old, new)
        assert mutated != sources[file] and ast.parse(mutated)
        test_file, _, expression = tests.partition(" -k ")
        for word in re.findall(r"[a-z]\w+", expression):
            assert word in ("and", "or", "not") or word in test_files[test_file], f"{tests}: {word}"


def test_what_does_not_apply_is_refused():
    source = (
        'def f(x):\n    """x + 1"""\n    return x + 1 + x + 1\n\n\n'
        "class A:\n    def f(self, x):\n        return x + 1\n"
    )
    assert mutate(source, "A.f", "x + 1", "x - 1").count("x - 1") == 1
    for function, old in (("f", "x + 1"), ("f", "x + 2"), ("g", "x"), ("A.g", "x")):
        with pytest.raises(ValueError):
            mutate(source, function, old, "y")
    ast.parse(mutate(source, "f", "return", "yield"))


def test_stored_result():
    stored = json.loads(RESULT.read_text())
    columns = ("file", "function", "old", "new")
    assert {tuple(row[name] for name in columns) for row in stored} == {(*m[:2], *m[3:]) for m in MUTATIONS}
    assert all(row["caught_by"] for row in stored)
