"""The code that computes a number, as a text that does not change with comments and layout.

Results are kept under the code that made them (kept.py). It is compared as syntax trees without
docstrings, comments, line breaks and the annotations of functions: an edit of these changes no
number. What counts is the source that was imported. In a notebook, a file may be edited long after
its import; until it is reloaded, the old code runs, and what it makes must keep the old name.
"""
import ast
import functools
import inspect
import os
import sys
import types
from pathlib import Path

from support.files import UnusableInput

_sources = {}                                           # absolute path -> source, as imported
_specs = {}                                             # name of a module -> its __spec__ then


def read_source(file: str) -> None:
    """Read the source of a file that makes numbers: call it when the file is imported."""
    path = os.path.abspath(file)
    _sources[path] = Path(path).read_text(encoding="utf-8")


def read_sources(*names: str) -> None:
    """Read the sources of imported modules, unless they were read since they were last loaded."""
    for name in names:
        module = sys.modules[name]
        # a reload gives a module a new __spec__
        if _specs.get(name) is not module.__spec__:
            _specs[name] = module.__spec__
            read_source(module.__file__)


def code_of_module(name: str) -> str:
    """Return the syntax tree of an imported module."""
    read_sources(name)
    return syntax(_sources[os.path.abspath(sys.modules[name].__file__)])


def code_of_function(function: types.FunctionType) -> str:
    """Return the syntax trees of a function, and of all that it uses of its own file.

    Names that it imports from a file that makes numbers are followed there: that is one whose
    source was read at its import. Raises TypeError for a nested function.
    """
    function = inspect.unwrap(function)                 # without decorators
    if function.__qualname__ != function.__name__:
        raise TypeError(f"{function.__qualname__}: want a function at the top level of a file")
    return code_of_name(function.__name__, function.__globals__)


def code_of_name(name: str, namespace: dict) -> str:
    """Return the syntax trees of a name at the top level of a file, and of all that it uses there.

    namespace: the globals of the file. Raises UnusableInput if it holds parts of another file that
    was loaded again since: then old code runs, but new code is imported.
    """
    file = os.path.abspath(namespace["__file__"])
    module = sys.modules.get(namespace["__name__"])
    # a program that was started has no __spec__; it reads its source when it starts
    is_imported = module is not None and getattr(module, "__spec__", None) is not None
    if is_imported and vars(module) is namespace:
        read_sources(module.__name__)
    elif file not in _sources:
        read_source(file)
    statements = _statements(_sources[file])
    code = []
    # the name, the names in its statements, the names in theirs, and so on
    used = [name]
    for name in used:
        for statement in statements[name]:
            if isinstance(statement, ast.ImportFrom):
                code.append(_imported(name, statement, namespace))
                continue
            code.append(ast.dump(_bare(statement)))
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and node.id in statements and node.id not in used:
                    used.append(node.id)
    return "\n".join(sorted(code))


def _imported(name: str, statement: ast.ImportFrom, namespace: dict) -> str:
    """Return the code of a name that a file imports; other names of the statement do not matter."""
    alias, = [alias for alias in statement.names if (alias.asname or alias.name) == name]
    source = sys.modules[statement.module]
    content = namespace[name]
    if content is not getattr(source, alias.name):
        raise UnusableInput(f"{statement.module} was loaded again, but {namespace['__name__']} "
                            f"still uses the old one: restart Python")
    code = f"from {statement.module} import {alias.name}"
    makes_numbers = os.path.abspath(getattr(source, "__file__", "")) in _sources
    if makes_numbers and not isinstance(content, types.ModuleType):
        code += code_of_name(alias.name, vars(source))
    return code


@functools.cache
def syntax(source: str) -> str:
    """Return the syntax tree of a source, without docstrings and annotations of functions."""
    return ast.dump(_bare(ast.parse(source)))


@functools.cache
def _statements(source: str) -> dict[str, list[ast.stmt]]:
    """Return the top-level statements that define or change each name: functions, classes,
    constants, imports of names."""
    found = {}
    for statement in ast.parse(source).body:
        names = set()
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom):
            names = {alias.asname or alias.name for alias in statement.names}
        elif not isinstance(statement, ast.Import):
            names = _changed(statement)
        for name in names:
            found.setdefault(name, []).append(statement)
    return found


def _changed(statement: ast.stmt) -> set[str]:
    """Return the names that a statement assigns, or whose contents it changes: T["a"] = 2."""
    names = set()
    for node in ast.walk(statement):
        if isinstance(getattr(node, "ctx", None), ast.Store):
            while isinstance(node, (ast.Subscript, ast.Attribute)):
                node = node.value
            if isinstance(node, ast.Name):
                names.add(node.id)
    return names


def _bare(tree: ast.AST) -> ast.AST:
    """Return a tree without docstrings and annotations of functions."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree
