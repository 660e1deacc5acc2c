"""The house: which file may import which, how long files may be, the numbers of the equations."""
import ast
import re
import sys

from running import HERE

PACKAGES = {"torch", "tiktoken", "tiktoken_ext", "numpy", "matplotlib"}
SUPPORT = sorted(path.stem for path in (HERE / "support").glob("*.py"))
# virtual environments and the like are not ours
FOLDERS = ("", "support", "experiments", "experiments/rewards", "tests")
FILES = [path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.py"))]


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


def test_imports_go_down_only():
    assert imports(HERE / "vbon.py") == {"torch"}
    assert rooms(imports(HERE / "model.py")) == {"torch"}
    assert rooms(imports(HERE / "reward.py")) == {"torch", "model"}
    assert rooms(imports(HERE / "train.py")) == {"torch", "vbon", "model", "reward", "support"}
    for name in SUPPORT:
        path = HERE / "support" / f"{name}.py"
        assert rooms(imports(path)) <= {"vbon", "model", "reward", "support"} | PACKAGES, name
        assert "matplotlib" not in rooms(imports(path, at_import_only=True)), name
    for path in FILES:
        if "train" in imports(path):
            assert path.parent.name in ("experiments", "tests") or path.name == "test_vbon.py", path


def test_there_is_no_circle_in_support():
    needs = {f"support.{name}": imports(HERE / "support" / f"{name}.py", True) for name in SUPPORT}
    while needs:
        free = [name for name in needs if not needs[name] & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_few_names_pass_between_the_rooms():
    """A library in disguise is what train.py must not become."""
    used = set()
    for path in (HERE / "experiments").glob("*.py"):
        if not path.name.startswith("test_"):
            source = path.read_text(encoding="utf-8")
            used |= set(re.findall(r"\btrain\.(\w+)", source)) - {"py"}
            for names in re.findall(r"^from train import (.+)$", source, re.MULTILINE):
                used |= set(names.split(", "))
    assert len(used) <= 15, sorted(used)
    taken = []
    for node in ast.parse((HERE / "train.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("support"):
            taken += [name.name for name in node.names]
    assert len(taken) <= 20, sorted(taken)


def lines(pattern):
    """The number of lines of the files with this name, and of no others."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in HERE.glob(pattern))


def test_files_stay_short_enough_to_be_read():
    assert lines("vbon.py") <= 350
    assert lines("model.py") <= 350
    assert lines("train.py") <= 400
    assert lines("reward.py") <= 75
    assert lines("support/*.py") <= 1900
    assert len(SUPPORT) <= 16
    tests = lines("experiments/test_*.py")
    assert lines("experiments/*.py") + lines("experiments/rewards/*.py") - tests <= 2400
    assert lines("test_vbon.py") + lines("tests/*.py") + tests <= 4000


def test_no_line_has_more_than_100_columns():
    too_long = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{path}:{number}")
    assert not too_long


def test_equations_are_numbered_once():
    """Each stands at the top of vbon.py, once. A citation such as (7) means one of those."""
    source = (HERE / "vbon.py").read_text(encoding="utf-8")
    assert re.findall(r"^    \((\d)\)  ", source, re.MULTILINE) == list("1234567")
