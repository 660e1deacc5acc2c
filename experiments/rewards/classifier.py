"""The reward of train.py's main job, seed 0, as a file: the logit of its sentiment classifier.

    python -m experiments.rewards.classifier DIR     the main job's prompts, for with_trl.py
"""
import sys
from pathlib import Path

import torch

import train
from reward import train_classifier
from support.sampling import seeded_generator
from support.text import make_text
from support.tokenizer import decode, encode

SETTINGS = train.Settings().text
TEXT = make_text(None, None, SETTINGS, 0)
CLASSIFIER = train_classifier(TEXT.tokens, TEXT.labels, TEXT.encoding.n_vocab, SETTINGS.epochs,
                              seeded_generator("cpu", "classifier", 0))


@torch.no_grad()
def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """One logit for each pair, read as one text."""
    texts = [prompt + response for prompt, response in zip(prompts, responses)]
    length = SETTINGS.prompt_tokens + SETTINGS.length
    return CLASSIFIER(encode(TEXT.encoding, texts, length)).tolist()


if __name__ == "__main__":
    for name, prompts in (("train", TEXT.prompts), ("held-out", TEXT.held_prompts)):
        lines = [decode(TEXT.encoding, ids) for ids in prompts.tolist()]
        Path(sys.argv[1], f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
