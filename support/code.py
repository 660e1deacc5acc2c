"""The code that computes a number, as a text that does not change with comments and layout.

Results are kept under the code that made them (kept.py). It is compared as syntax trees without
docstrings, comments, line breaks and the annotations of functions: an edit of these changes no
number. What counts is the source that was imported. In a notebook, a file may be edited long after
its import; until it is reloaded, the old code runs, and what it makes must keep the old name.
"""
import ast
import functools
import os
import sys
import types
from pathlib import Path

_sources = {}                                           # absolute path -> source, as imported
_specs = {}                                             # name of a module -> its __spec__ then


def read_source(file: str) -> None:
    """Read the source of a file that is being executed: call it there, with __file__."""
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
    """Return the syntax trees of a function and of all that it uses of its own file."""
    file = os.path.abspath(function.__globals__["__file__"])
    module = sys.modules.get(function.__module__)
    if module is not None and vars(module) is function.__globals__ and module.__spec__ is not None:
        read_sources(function.__module__)
    elif file not in _sources:
        read_source(file)
    definitions = _definitions(_sources[file])
    if function.__name__ not in definitions:
        raise TypeError(f"{function.__qualname__}: want a function at the top level of a file")
    # the function, the names in it, the names in what they stand for, and so on
    used = [function.__name__]
    for name in used:
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in used:
                used.append(node.id)
    return "\n".join(ast.dump(definitions[name]) for name in sorted(used))


@functools.cache
def syntax(source: str) -> str:
    """Return the syntax tree of a source, without docstrings and annotations of functions."""
    return ast.dump(_bare(source))


@functools.cache
def _definitions(source: str) -> dict[str, ast.AST]:
    """Return the functions, classes and constants of a source, by name."""
    found = {}
    for node in _bare(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def _bare(source: str) -> ast.Module:
    """Parse a source, and remove docstrings and the annotations of functions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree
