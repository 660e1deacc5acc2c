"""The command line: flags, and the exit status of a program."""
import argparse
import dataclasses
import sys
from collections.abc import Callable

from support.files import UnusableInput
from support.settings import flag


class Parser(argparse.ArgumentParser):
    """Raises UnusableInput where argparse would end the program."""

    def error(self, message: str) -> None:
        raise UnusableInput(message)

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        """As in argparse; a quick run gets a folder of its own, and no text may be empty."""
        found = super().parse_args(*args, **kwargs)
        if found.out is None:
            found.out = "out-quick" if found.quick else "out"
        for name, value in vars(found).items():
            if isinstance(value, str) and not value.strip():    # a variable of a script, not set
                raise UnusableInput(f"{flag(name)} is empty")
        return found


def make_parser(description: str, settings, several: bool = False) -> Parser:
    """Return a parser of all flags. With `several`, --n and --seed take any number of values."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Other texts and models have other settings: see support/settings.py.")
    nargs = "+" if several else None
    run = parser.add_argument_group("the run")
    run.add_argument("--n", type=int, nargs=nargs, default=[4] if several else 4,
                     help="N; above 8, with three times the updates (default: 4)")
    run.add_argument("--seed", type=int, nargs=nargs, default=[0] if several else 0,
                     help="another seed repeats everything, also the text (default: 0)")
    if not several:
        run.add_argument("--sample", metavar="TEXT", help="only print responses of a finished run, "
                         "of its reference, best-of-N and policy, to the prompt TEXT")
    run.add_argument("--out", metavar="DIR", help="folder of results (default: out or out-quick)")
    run.add_argument("--device", default="auto", help="cpu, cuda or mps (default: cuda or cpu)")
    run.add_argument("--quick", action="store_true", help="tiny sizes: see that the program runs")

    inputs = parser.add_argument_group("your own text, reward and model")
    inputs.add_argument("--data", metavar="DIR", help="folder of reviews: pos.txt and neg.txt, one "
                        "a line, or pos/*.txt and neg/*.txt, one a file; texts.txt, one a line, is "
                        "enough with --reward")
    inputs.add_argument("--reward", metavar="FILE.py", help="Python file with a function "
                        "reward(prompts, responses): lists of texts in, a number for each pair out")
    inputs.add_argument("--init", metavar="GPT2", help="weights of a GPT-2 to start from: gpt2, "
                        "gpt2-medium, gpt2-large, gpt2-xl (downloaded), or a Hugging Face folder")

    for stage in dataclasses.fields(settings):
        values = getattr(settings, stage.name)
        group = parser.add_argument_group(f"settings: {stage.name}", values.__doc__)
        for field in dataclasses.fields(values):
            group.add_argument(flag(field.name), type=type(field.default), metavar="X",
                               help=f"{field.metadata['help']} (built-in text: {field.default:g})")
    return parser


def run(program: Callable[[], object], name: str) -> None:
    """Run a program. Exit with 2 for unusable input, 130 for Ctrl-C, 1 for a bug."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # where ± cannot be printed, print ? instead
    try:
        program()
    except UnusableInput as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished stage or update",
              file=sys.stderr)
        sys.exit(130)
