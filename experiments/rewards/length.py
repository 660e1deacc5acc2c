"""The number of words in a response: a reward that ties.

    python train.py --n 4 --reward experiments/rewards/length.py
"""


def reward(prompts: list[str], responses: list[str]) -> list[int]:
    """Return one number for each response."""
    return [len(response.split()) for response in responses]
