"""The settings for your own text, another model and a large N, and for --quick."""
import argparse
import dataclasses

from support.files import UnusableInput
from support.inputs import Inputs
from support.processes import world_size


class AllSettings:
    """Base of a dataclass with a field for each stage, which holds the settings of this stage."""

    def change(self, **values: float) -> "AllSettings":
        """Return settings with these values, each in all stages that have a setting of its name."""
        unknown = values.keys() - self.flat().keys()
        if unknown:
            raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
        stages = {}
        for stage in dataclasses.fields(self):
            old = getattr(self, stage.name)
            own = {name: value for name, value in values.items() if hasattr(old, name)}
            stages[stage.name] = dataclasses.replace(old, **own)
        return dataclasses.replace(self, **stages)

    def flat(self) -> dict:
        """Return the settings of all stages, by name."""
        found = {}
        for stage in dataclasses.asdict(self).values():
            found |= stage
        return found


def choose_settings(s: AllSettings, args: argparse.Namespace, n: int, inputs: Inputs
                    ) -> AllSettings:
    """Return the settings for this kind of text and model, from those for the built-in text."""
    s = s.change(prompt_tokens=args.prompt_tokens or 4, length=args.length or s.text.length,
                 processes=world_size())
    if inputs.reviews is not None:
        # real text has more distinct words and sentences than the built-in one: more of everything
        count = len(inputs.reviews)
        s = s.change(
            reviews=count,
            vocab=min(2048, max(512, count // 4)),
            lm_steps=min(2000, count // 3),             # about twenty passes over the reviews
            lm_lr=3e-3,
            epochs=6,
            m=128,
            steps=600,
            length=args.length or 0,                    # chosen when the text is read
        )
    if inputs.pretrained is not None:
        # GPT-2 knows English already, and one update of it takes minutes on two cores
        size = inputs.pretrained.model.config
        room = size["block_size"] - s.text.prompt_tokens
        if room < 1:
            raise UnusableInput("--init: this model has no room for a prompt and a response")
        s = s.change(
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
            length=min(s.text.length, room),
        )
    if args.quick:
        s = s.change(lm_steps=10, epochs=1, prompts=8, m=16, held_prompts=8, m_eval=64, steps=3,
                     batch=4, k=4, k_eval=8)
        if inputs.pretrained is None:
            s = s.change(vocab=400, width=32)
        if inputs.reviews is None:
            s = s.change(reviews=600)
    if n > 8:
        # For a large N, poor responses must become very improbable. The policy samples them ever
        # more rarely, so it learns this slowly.
        s = s.change(steps=3 * s.tuning.steps)
    # last, the command line
    for name in ("lm_steps", "steps", "m"):
        value = getattr(args, name)
        if value is not None:
            s = s.change(**{name: value})
    return s


def check_settings(s: AllSettings, args: argparse.Namespace, n: int) -> None:
    """Raise UnusableInput for flags that do not fit the text and the model."""
    if n > s.samples.m_eval:
        raise UnusableInput(f"--n {n}: want at most {s.samples.m_eval}, the number of samples that "
                            f"best-of-N is evaluated with")
    if args.length is not None and args.length > s.text.length:
        raise UnusableInput(f"--length {args.length}: the model of --init has room for "
                            f"{s.text.length}")
