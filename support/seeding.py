"""Random numbers: a generator for each purpose, derived from the purpose's name."""
import hashlib

import torch


def seeded_generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Return a generator whose seed is derived from the names, such as ("batch", seed, step).

    Each purpose has its own generator. So what is sampled for one purpose does not depend on what
    was sampled before for others, and a resumed run ends with the numbers of an uninterrupted one.
    """
    text = "".join(f"{name!r};" for name in names)
    seed = int(hashlib.sha256(text.encode("utf-8")).hexdigest()[:12], 16)
    return torch.Generator(device).manual_seed(seed)
