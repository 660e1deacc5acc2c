"""The command line: flags, checks of their values, and the exit status of a program."""
import argparse
import io
import os
import sys
from collections.abc import Callable

from support.files import UnusableInput


class Parser(argparse.ArgumentParser):
    """Raises UnusableInput where argparse would end the program."""

    def error(self, message: str) -> None:
        raise UnusableInput(message)

    def parse_args(self, *args, **kwargs) -> argparse.Namespace:
        """As in argparse; a quick run gets a folder of its own."""
        found = super().parse_args(*args, **kwargs)
        words = sys.argv[1:] if not args or args[0] is None else args[0]
        found.given = [word.split("=")[0] for word in words if word.startswith("--")]
        if found.out is None and hasattr(found, "quick"):
            found.out = "out-quick" if found.quick else "out"
        return found


def make_parser(description: str, several: bool = False) -> argparse.ArgumentParser:
    """Return a parser of the flags that train.py and the experiments share.

    With `several`, --n and --seed take any number of values, else one.
    """
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    nargs = "+" if several else None

    method = parser.add_argument_group("the method")
    method.add_argument("--n", type=int, nargs=nargs, default=[4] if several else 4,
                        help="The N of best-of-N. A larger N means a higher reward, further away "
                        "from the reference. Above 8, training takes three times the updates. "
                        "Default: 4.")
    method.add_argument("--seed", type=int, nargs=nargs, default=[0] if several else 0,
                        help="Another seed repeats everything, the built-in text included, with "
                        "other random numbers. Default: 0.")
    method.add_argument("--steps", type=int, help="The number of updates in fine-tuning. With more "
                        "updates the policy comes closer to best-of-N. Default: 90 for the "
                        "built-in text, 600 with --data, 250 with --init.")
    method.add_argument("--m", type=int, help="The number of reference samples for each training "
                        "prompt. With more samples, F is estimated better. Default: 64, or 128 "
                        "with --data.")

    inputs = parser.add_argument_group("your own text, reward and model")
    inputs.add_argument("--data", metavar="DIR", help="A folder with your own labelled reviews: "
                        "pos.txt and neg.txt, one review a line, or pos/*.txt and neg/*.txt, one "
                        "review a file; with --reward, prompts.txt is enough. Default: built-in "
                        "reviews.")
    inputs.add_argument("--reward", metavar="FILE.py", help="A Python file that defines "
                        "reward(prompts, responses): two lists of texts in, one number for each "
                        "pair out. With it, --data may hold prompts.txt, one text a line, without "
                        "labels. Changes of files that it imports are not noticed. Default: a "
                        "sentiment classifier.")
    inputs.add_argument("--init", metavar="GPT2", help="Start the reference model from gpt2, "
                        "gpt2-medium, gpt2-large or gpt2-xl, which are downloaded, or from a "
                        "Hugging Face folder of a GPT-2. Default: a new small model.")
    inputs.add_argument("--lm-steps", type=int, metavar="S", help="The number of updates of the "
                        "reference model, before anything else. With 0, the model is used as it "
                        "is. Default: 1000 for the built-in text, else by the size of the text.")
    inputs.add_argument("--prompt-tokens", type=int, metavar="T", help="The number of tokens at "
                        "the start of each text that form its prompt. Default: 4.")
    inputs.add_argument("--length", type=int, metavar="L", help="The largest number of tokens in a "
                        "response; all costs grow with it. Default: 24 for the built-in text; "
                        "with --data, the length at which at most a tenth of the texts is cut, up "
                        "to 64.")

    run = parser.add_argument_group("the run")
    run.add_argument("--sample", metavar="TEXT", help="Print responses of the reference, of "
                     "best-of-N and of the policy to the prompt TEXT. Models that are not trained "
                     "yet are trained first.")
    run.add_argument("--out", metavar="DIR", help="The folder for results, pictures and finished "
                     "stages. Default: out, or out-quick with --quick.")
    run.add_argument("--device", default="auto", help="The device to compute on: cpu, cuda or mps. "
                     "Default: cuda where it is available, else cpu.")
    run.add_argument("--quick", action="store_true", help="Use tiny sizes: a few seconds that show "
                     "that the program runs. The numbers mean nothing.")
    return parser


def check_arguments(args: argparse.Namespace, ns: list[int]) -> None:
    """Raise UnusableInput for a wrong value, before anything is read or downloaded."""
    for n in ns:
        _check_at_least(1, "--n", n)
    _check_at_least(0, "--lm-steps", args.lm_steps)
    _check_at_least(1, "--prompt-tokens", args.prompt_tokens)
    _check_at_least(1, "--length", args.length)
    _check_at_least(1, "--steps", args.steps)
    _check_at_least(1, "--m", args.m)
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.strip():        # a variable of a script, not set
            raise UnusableInput(f"--{name.replace('_', '-')} is empty")


def _check_at_least(least: int, flag: str, value: int | None) -> None:
    if value is not None and value < least:
        raise UnusableInput(f"{flag} {value}: want at least {least}")


class _PatientOutput:
    """Standard output for long work: the program goes on when nobody can read it any more, as with
    `train.py | head -1`, or on a full disk."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *args: str):
        try:
            return function(*args)
        except OSError:
            # from now on, everything goes to the null device
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def run(program: Callable[[], object], name: str) -> None:
    """Run a program, and exit as the shell expects: 2 for unusable input, 130 for Ctrl-C.

    Any other exception keeps its traceback and exits with status 1: it may be a bug in these files.
    """
    if sys.stdout is None:                              # closed by the shell
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # where ± cannot be printed, print ? instead
        sys.stdout = _PatientOutput(sys.stdout)
    try:
        program()
    except UnusableInput as error:
        message = str(error).splitlines()[0]
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues after the last finished stage or update",
              file=sys.stderr)
        sys.exit(130)
