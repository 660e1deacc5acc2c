"""How the tests run the main job, and what they read of its results."""
import contextlib
import io
import json
import os
from pathlib import Path

import train
from support import options

HERE = Path(train.__file__).parent


def run(*args, cwd):
    """`python train.py ARGS` inside this process: status, standard output, standard error.

    Results go to the folder "out" there, also those of quick runs.
    """
    if "--out" not in args:
        args = (*args, "--out", "out")
    out = io.StringIO()
    error = io.StringIO()
    status = 0
    before = os.getcwd()
    os.chdir(cwd)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            options.run(lambda: train.main([str(arg) for arg in args]), "train.py")
        except SystemExit as stop:
            status = stop.code
        finally:
            os.chdir(before)
    return status, out.getvalue(), error.getvalue()


def read_lines(path):
    """The objects in a file with one JSON object a line, without `seconds`, the only timing."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]


def read_rows(out):
    """The lines of results.jsonl."""
    return read_lines(Path(out, "results.jsonl"))
