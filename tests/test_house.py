"""The house: which file may import which, and the numbers of the equations."""
import ast
import sys

import pytest
from running import HERE

import vbon

OURS = {"vbon", "model", "reward", "train", "support", "experiments"}
PACKAGES = {"torch", "tiktoken", "tiktoken_ext", "numpy", "matplotlib"}
SUPPORT = sorted(path.stem for path in (HERE / "support").glob("*.py"))


def imports(path, at_import_only=False):
    """The modules that a file imports, such as "model" and "support.kept"."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            if node.module in ("support", "experiments"):
                found |= {f"{node.module}.{name.name}" for name in node.names}
            else:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def rooms(names):
    return {name.split(".")[0] for name in names}


def test_the_top_files_import_only_what_is_below_them():
    assert imports(HERE / "vbon.py") == {"torch"}
    assert rooms(imports(HERE / "model.py", at_import_only=True)) == {"torch"}
    assert rooms(imports(HERE / "reward.py")) == {"torch", "model"}
    assert rooms(imports(HERE / "train.py")) == {"torch", "vbon", "model", "reward", "support"}


@pytest.mark.parametrize("name", SUPPORT)
def test_nothing_in_support_imports_what_is_above_it(name):
    found = rooms(imports(HERE / "support" / f"{name}.py"))
    assert found <= {"vbon", "model", "reward", "support"} | PACKAGES
    assert "matplotlib" not in rooms(imports(HERE / "support" / f"{name}.py", True))


def test_there_is_no_circle_in_support():
    needs = {f"support.{name}": imports(HERE / "support" / f"{name}.py", True) for name in SUPPORT}
    while needs:
        free = [name for name in needs if not needs[name] & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_only_experiments_and_tests_import_train():
    for path in HERE.rglob("*.py"):
        inside = path.relative_to(HERE).parts[0]
        if inside.startswith("."):                      # such as a virtual environment
            continue
        if "train" in imports(path):
            assert inside in ("experiments", "tests", "test_vbon.py"), path


def test_experiments_use_few_names_of_train():
    """A library in disguise is what train.py must not become."""
    used = set()
    for path in (HERE / "experiments").glob("*.py"):
        if path.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "train":
                    used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "train":
                used |= {name.name for name in node.names}
    assert len(used) <= 15, sorted(used)


def test_equations_are_numbered_from_1_to_7():
    """A citation such as (7) in vbon.py means one of those at its top."""
    top = vbon.__doc__
    for number in range(1, 8):
        assert f"    ({number})  " in top
    assert "(8)" not in (HERE / "vbon.py").read_text(encoding="utf-8")
