"""Settings: how each is declared, and what other texts and models, a large N and --quick change."""
import argparse
import dataclasses
import math

from support.files import UnusableInput
from support.inputs import Inputs


def setting(default: int | float, help: str, least: int | float = 1) -> dataclasses.Field:
    """Return a field of a dataclass of settings. It is also a flag, with this help."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


def all_fields(settings) -> list[dataclasses.Field]:
    """Return the fields of all stages."""
    found = []
    for stage in dataclasses.fields(settings):
        found += dataclasses.fields(getattr(settings, stage.name))
    return found


def flat(settings) -> dict[str, int | float]:
    """Return the settings of all stages, by name."""
    found = {}
    for stage in dataclasses.asdict(settings).values():
        found |= stage
    return found


def change(settings, **values: int | float):
    """Return settings with these values, each in the stage that has a setting of its name."""
    stages = {}
    for stage in dataclasses.fields(settings):
        old = getattr(settings, stage.name)
        own = {name: values.pop(name) for name in list(values) if hasattr(old, name)}
        stages[stage.name] = dataclasses.replace(old, **own)
    if values:
        raise TypeError(f"no such settings: {', '.join(values)}")
    return dataclasses.replace(settings, **stages)


def choose_settings(s, args: argparse.Namespace, n: int, inputs: Inputs):
    """Return the settings of a run, from those for the built-in text. Raises UnusableInput."""
    given = {name: getattr(args, name) for name in flat(s) if getattr(args, name) is not None}
    prompt_tokens = given.get("prompt_tokens", s.text.prompt_tokens)
    if inputs.reviews is not None:
        # real text has more distinct words and sentences than the built-in one: more of everything
        count = len(inputs.reviews)
        s = change(
            s,
            reviews=count,
            vocab=min(2048, max(512, count // 4)),
            lm_steps=min(2000, count // 3),             # about twenty passes over the reviews
            lm_lr=3e-3,
            epochs=6,
            m=128,
            steps=600,
            length=0,                                   # chosen when the text is read
        )
    if inputs.pretrained is not None:
        # GPT-2 knows English already, and one update of it takes minutes on two cores
        size = inputs.pretrained.model.config
        s = change(
            s,
            vocab=size["vocab_size"],
            layers=size["n_layer"],
            heads=size["n_head"],
            width=size["n_embd"],
            lm_steps=min(150, s.text.reviews // 50),    # about one pass over the reviews
            lm_lr=5e-5,
            prompts=256,
            m=64,
            held_prompts=32,
            steps=250,
            length=min(s.text.length, size["block_size"] - prompt_tokens),
        )
    if args.quick:
        s = change(s, lm_steps=10, epochs=1, prompts=8, m=16, held_prompts=8, m_eval=64, steps=3,
                   batch=4, k=4, k_eval=8)
        if inputs.pretrained is None:
            s = change(s, vocab=400, width=32)
        if inputs.reviews is None:
            s = change(s, reviews=600)
    if n > 8:
        # For a large N, poor responses must become very improbable. The policy samples them ever
        # more rarely, so it learns this slowly.
        s = change(s, steps=3 * s.tuning.steps)
    # last, the command line
    s = change(s, **given)
    _check(s, given, n, inputs)
    if s.samples.m < n:
        print(f"note: {s.samples.m} reference samples are few for n = {n}; raise --m")
    return s


def _check(s, given: dict, n: int, inputs: Inputs) -> None:
    """Raise UnusableInput for values that are out of range, or do not fit together."""
    limits = {x.name: x.metadata["least"] for x in all_fields(s)} | {"n": 1}
    for name, value in (given | {"n": n}).items():
        if not limits[name] <= value < math.inf:
            raise UnusableInput(f"{flag(name)} {value}: want at least {limits[name]}")
    fixed = ["reviews"] if inputs.reviews is not None else []
    if inputs.pretrained is not None:
        fixed += ["vocab", "layers", "heads", "width"]
        room = inputs.pretrained.model.config["block_size"] - s.text.prompt_tokens
        if room < max(1, s.text.length):
            raise UnusableInput(f"--init: this model has room for {room} tokens behind a prompt, "
                                f"want {max(1, s.text.length)}")
    for name in fixed:
        if name in given:
            raise UnusableInput(f"{flag(name)}: it is given by --data or --init")
    if s.reference.width % s.reference.heads != 0:
        raise UnusableInput(f"--width {s.reference.width}: want a multiple of --heads "
                            f"{s.reference.heads}")
    if n > s.samples.m_eval:
        raise UnusableInput(f"--n {n}: want at most {s.samples.m_eval}, the number of samples that "
                            f"best-of-N is evaluated on")


def flag(name: str) -> str:
    """Return the flag of a setting: --lm-steps for lm_steps."""
    return "--" + name.replace("_", "-")
