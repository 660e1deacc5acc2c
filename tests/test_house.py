"""The house: which file may import which, how long files may be, the numbers of the equations."""
import ast
import re
import sys

from running import HERE

PACKAGES = {"torch", "tiktoken", "tiktoken_ext", "numpy", "matplotlib"}
FOLDERS = ("", "support", "experiments", "experiments/rewards", "tests")
FILES = [path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.py"))]
SUPPORT = [path for path in FILES if path.parent.name == "support"]


def imports(path):
    """The modules that a file imports, such as "model" and "support.kept"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("support", "experiments"):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def rooms(path):
    return {name.split(".")[0] for name in imports(path)}


def test_imports_go_down_only():
    assert rooms(HERE / "vbon.py") == rooms(HERE / "model.py") == {"torch"}
    assert rooms(HERE / "reward.py") == {"torch", "model"}
    assert rooms(HERE / "train.py") == {"torch", "vbon", "model", "reward", "support"}
    for path in SUPPORT:
        assert rooms(path) <= {"vbon", "model", "reward", "support"} | PACKAGES, path
    for path in FILES:
        if "train" in imports(path):
            above = path.parent.name in ("experiments", "rewards", "tests")
            assert above or path.name == "test_vbon.py", path


def test_few_names_pass_between_the_rooms():
    """A library in disguise is what train.py must not become."""
    used = set()
    for path in FILES:
        if path.parent.name == "experiments" and not path.name.startswith("test_"):
            source = path.read_text(encoding="utf-8")
            used |= set(re.findall(r"\btrain\.(\w+)", source)) - {"py"}
            for names in re.findall(r"^from train import (.+)$", source, re.MULTILINE):
                used |= set(names.split(", "))
    assert len(used) <= 16, sorted(used)
    source = (HERE / "train.py").read_text(encoding="utf-8")
    taken = ", ".join(re.findall(r"^from support\S* import (.+)$", source, re.MULTILINE))
    assert len(taken.split(", ")) <= 20, taken


def test_files_stay_short_enough_to_be_read():
    lines = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8").splitlines()
        too_long = [number for number, line in enumerate(text, 1) if len(line) > 100]
        assert not too_long, path
        room = path.relative_to(HERE).parts[0]
        if path.name.startswith("test_") or room == "tests":
            room = "all tests"
        lines[room] = lines.get(room, 0) + len(text)
    limits = {"vbon.py": 350, "model.py": 350, "reward.py": 75, "train.py": 400, "support": 1900,
              "experiments": 2650, "all tests": 4150}
    assert {room: lines[room] for room in limits if lines[room] > limits[room]} == {}
    assert len(lines) == len(limits)                    # no other file
    assert len(SUPPORT) <= 16


def test_equations_are_numbered_once():
    """Each stands at the top of vbon.py, once. A citation such as (7) means one of those."""
    source = (HERE / "vbon.py").read_text(encoding="utf-8")
    assert re.findall(r"^    \((\d)\)  ", source, re.MULTILINE) == list("1234567")
