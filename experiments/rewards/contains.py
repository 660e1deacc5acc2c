"""1 if a response has one of some words in it, else 0: right or wrong, as with rewards that verify.

    python train.py --n 4 --reward experiments/rewards/contains.py
"""
WORDS = ("superb", "worth every minute")


def reward(prompts: list[str], responses: list[str]) -> list[bool]:
    """Return one truth value for each response."""
    return [any(word in response for word in WORDS) for response in responses]
