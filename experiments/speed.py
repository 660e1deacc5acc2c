"""speed.py: what sampling and an update cost, for models of three sizes.

    pip install transformers
    python -m experiments.speed                     on the CPU: some minutes, most for GPT-2's size
    python -m experiments.speed --device cuda       on a GPU

Sampling is timed beside transformers' generate, in turn. Medians of 5.
"""
import argparse
import copy
import resource                                         # Windows does not have it
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import train
from model import GPT, add_adapters
from support.huggingface import save_model
from support.inputs import choose_device

TEXT = train.Settings().text
TUNING = train.Settings().tuning
SIZES = ((2, 64, 2, 768), (4, 128, 4, 2048), (12, 768, 12, 50257))  # layers, width, heads, tokens


def main(argv: list[str] | None = None) -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Only to see that it runs.")
    parser.add_argument("--device", default="cpu", help="The device: cpu or cuda. Default: cpu.")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads\n\n"
          f"{'median seconds':22}{'64 responses of':>17}{'generate of':>15}{'an update of':>14}"
          f"{'memory':>8}\n"
          f"{'(fastest-slowest)':22}{f'{TEXT.length} tokens':>17}{'transformers':>15}"
          f"{f'{TUNING.batch * TUNING.k}':>14}{'GB':>8}")
    for size in SIZES[:1] if args.quick else SIZES:
        layers, width, heads, tokens = size
        reference = GPT(tokens, TEXT.prompt_tokens + TEXT.length, layers, heads, width,
                        generator=torch.Generator().manual_seed(0))
        repeats = 1 if args.quick else 5
        ours, theirs = time_sampling(reference.to(device), repeats, device)
        update = prepare_update(reference, device)
        seconds = measure([update], 1 if width == 768 else repeats, device)[0]
        print(f"{f'{layers} layers, width {width}':20}{spread(ours):>19}{spread(theirs):>19}"
              f"{spread(seconds):>19}{memory(device) / 1e9:6.1f}")


def spread(seconds: list[float]) -> str:
    """Format the median, the fastest and the slowest."""
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g}-{max(seconds):.3g})"


def measure(calls: list[Callable[[], object]], repeats: int, device: torch.device
            ) -> list[list[float]]:
    """Return the seconds of each of these calls, in turn, several times."""
    seconds = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, found in zip(calls, seconds):
            began = time.perf_counter()
            call()
            torch.zeros(1, device=device).item()        # waits for a GPU
            if repeat > 0:                              # the first call includes preparations
                found.append(time.perf_counter() - began)
    return seconds


def memory(device: torch.device) -> int:
    """Return the largest memory so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss     # as Linux counts


def time_sampling(model: GPT, repeats: int, device: torch.device) -> list[list[float]]:
    """Return seconds of our `sample`, and of generate with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(model.eot, (8, TEXT.prompt_tokens), generator=generator, device=device)
    rows = prompt.repeat_interleave(8, 0)

    def ours() -> tuple[Tensor, Tensor]:
        return model.sample(prompt, 8, TEXT.length, generator)

    def theirs() -> Tensor:
        # the full softmax at temperature 1, as in our `sample`
        return other.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0,
                              top_p=1.0, temperature=1.0, max_new_tokens=TEXT.length,
                              pad_token_id=model.eot)

    return measure([ours, theirs], repeats, device)


def prepare_update(reference: GPT, device: torch.device) -> Callable[[], None]:
    """Return an update of the main job."""
    reference.untie_head()
    policy = copy.deepcopy(reference)
    trained = add_adapters(policy, TUNING.rank, torch.Generator())
    optimizer = torch.optim.Adam(trained, lr=1e-5, fused=True)
    prompt = torch.randint(reference.eot, (TUNING.batch, TEXT.prompt_tokens), device=device)
    # late in training, n has its full size
    batch = train.Batch(TUNING.steps, prompt, torch.zeros(1, 1, TEXT.length),
                        torch.randn(TUNING.batch, 64))
    generator = torch.Generator(device).manual_seed(0)

    def update() -> None:
        optimizer.zero_grad()
        # a reward that costs nothing
        train.vbon_gradient(policy, reference, lambda prompt, response: response.sum(-1), batch, 4,
                            TUNING, generator)
        optimizer.step()

    return update


if __name__ == "__main__":
    main()
