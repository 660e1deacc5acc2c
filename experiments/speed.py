"""speed.py: our sampling beside transformers' generate, our update beside TRL's RLOOTrainer.

    pip install transformers trl
    python -m experiments.speed                     on the CPU
    python -m experiments.speed --device cuda       on a GPU

All in turn on one machine, medians of 5. What needs a library that is missing is left out. It also
prints the versions, memory, and the share of the peak of a matrix product.
"""
import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import train
from experiments.studies import prepare_update
from model import GPT
from support.huggingface import save_model
from support.announce import matmul_speed, operations
from support.reviews import builtin_reviews
from support.text import Text
from support.tokenizer import encode, save_tokenizer, train_tokenizer

SETTINGS = train.Settings()
TUNING = SETTINGS.tuning
TOKENS = SETTINGS.text.prompt_tokens + SETTINGS.text.length
ROOT = Path(__file__).parent.parent
# layers, width, heads, vocabulary, responses in a batch of sampling
SMALL = (2, 64, 2, 768, 512)
MIDDLE = (4, 128, 4, 2048, 512)
GPT2 = (12, 768, 12, 50257, 64)


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Only to see that it runs.")
    parser.add_argument("--device", default="cpu", help="The device: cpu or cuda. Default: cpu.")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    repeats = 1 if args.quick else 5
    on_gpu = device.type == "cuda"
    sizes = (SMALL,) if args.quick else (SMALL, MIDDLE, GPT2[:4] + (512 if on_gpu else 64,))
    if on_gpu:
        # as in train.py
        torch.set_float32_matmul_precision("high")
    peak = matmul_peak(device)
    print_versions(device, peak)

    if importlib.util.find_spec("transformers"):
        print(f"\n{f'sampling responses of {TUNING.length} tokens':36}{'generate':>23}{'ours':>23}"
              f"{'times':>7}")
        for size in sizes:
            theirs, ours = time_sampling(size, repeats, device)
            print_pair(f"{size[0]} layers of width {size[1]}, {size[4]} at a time", theirs, ours)

    print(f"\n{'one update, 512 responses':36}{'seconds':>23}{'of the peak':>13}{'memory':>10}")
    for size in (SMALL, GPT2) if on_gpu and not args.quick else (SMALL,):
        seconds, share, memory = time_update(size, repeats, device, peak)
        print(f"{f'{size[0]} layers of width {size[1]}':36}{spread(seconds):>23}{share:13.0%}"
              f"{memory:>10}")

    if importlib.util.find_spec("trl") and not on_gpu:
        print(f"\n{'one update, 512 responses':36}{'RLOOTrainer':>23}{'ours':>23}{'times':>7}")
        with tempfile.TemporaryDirectory() as folder:
            ours, _, _ = time_update(SMALL, repeats, device, peak)
            print_pair("2 layers of width 64", time_rloo(Path(folder), repeats), ours)

    seconds = time_main_job(args.quick, args.device)
    model = GPT(SETTINGS.text.vocab, TOKENS, *SMALL[:1], SMALL[2], SMALL[1])
    text = Text(None, TUNING.length, 0.0, TUNING.length, *[None] * 4,
                torch.zeros(SETTINGS.text.prompts), torch.zeros(SETTINGS.text.held_prompts))
    arithmetic = operations(SETTINGS, model, text) / peak
    job = "--n 4 --quick" if args.quick else "--n 4"
    print(f"\npython train.py {job} takes {seconds:.0f} s; the matrix products of --n 4 alone, all "
          f"responses\nin their full length, take {arithmetic:.1f} s at the peak")


def print_versions(device: torch.device, peak: float) -> None:
    """Print what all this was measured with."""
    versions = []
    for name in ("torch", "transformers", "trl"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{torch.get_num_threads()} threads"
    print(f"Python {platform.python_version()}, {', '.join(versions)}; {machine}; a matrix product "
          f"runs at {peak / 1e9:,.0f} GFLOP/s")


def print_pair(name: str, theirs: list[float], ours: list[float]) -> None:
    """Print a row: the seconds of both, and how many times as fast ours is, by the medians."""
    times = statistics.median(theirs) / statistics.median(ours)
    print(f"{name:36}{spread(theirs):>23}{spread(ours):>23}{times:7.1f}")


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, until the device has finished."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: list[float]) -> str:
    """Format the median, the fastest and the slowest."""
    return f"{statistics.median(seconds):.3g} s ({min(seconds):.3g}-{max(seconds):.3g})"


def matmul_peak(device: torch.device) -> float:
    """Return the operations per second of a large matrix product, the best of several."""
    return matmul_speed(device, 8192 if device.type == "cuda" else 2048, 20)

# ------------------------------------------------------------------------ beside transformers

def time_sampling(size: tuple, repeats: int, device: torch.device
                  ) -> tuple[list[float], list[float]]:
    """Return seconds of generate and of our `sample`, in turn, with the same random weights."""
    from transformers import AutoModelForCausalLM
    layers, width, heads, vocab, responses = size
    generator = torch.Generator(device).manual_seed(0)
    model = GPT(vocab, TOKENS, layers, heads, width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    model = model.to(device)
    prompt = torch.randint(vocab - 1, (responses // TUNING.k, SETTINGS.text.prompt_tokens),
                           generator=generator, device=device)
    rows = prompt.repeat_interleave(TUNING.k, 0)

    def theirs() -> Tensor:
        # the full softmax at temperature 1, as in our `sample`
        return other.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0,
                              top_p=1.0, temperature=1.0, max_new_tokens=TUNING.length,
                              pad_token_id=model.eot)

    def ours() -> tuple[Tensor, Tensor]:
        return model.sample(prompt, TUNING.k, TUNING.length, generator)

    # the first call includes preparations
    theirs()
    ours()
    seconds = [(measure(theirs, device), measure(ours, device)) for _ in range(repeats)]
    return [pair[0] for pair in seconds], [pair[1] for pair in seconds]

# ------------------------------------------------------------------------------------ one update

def time_update(size: tuple, repeats: int, device: torch.device, peak: float
                ) -> tuple[list[float], float, str]:
    """Return the seconds of updates with adapters, as in the main job; their share of the peak, if
    all responses had their full length; and the largest memory."""
    layers, width, heads, vocab, _ = size
    update, _, count = prepare_update(layers, width, heads, vocab, device)
    update()                                            # the first one includes preparations
    seconds = [measure(update, device) for _ in range(repeats)]
    memory = ""
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    return seconds, count / statistics.median(seconds) / peak, memory

# ------------------------------------------------------------------------------------ beside TRL

def time_rloo(folder: Path, repeats: int) -> list[float]:
    """Return the seconds of TRL's RLOOTrainer for a step: the same model, prompts and sizes, but
    all weights are trained."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer
    texts = [text for text, _ in builtin_reviews(SETTINGS.text.reviews, 0)]
    encoding = train_tokenizer(texts[:2000], SETTINGS.text.vocab)
    model = GPT(encoding.n_vocab, TOKENS, *SMALL[:1], SMALL[2], SMALL[1],
                generator=torch.Generator().manual_seed(0))
    prompt = encode(encoding, texts[:TUNING.batch], SETTINGS.text.prompt_tokens)
    save_model(model, folder)
    save_tokenizer(encoding, folder)
    prompts = [encoding.decode(ids) for ids in prompt.tolist()]
    began = []

    class Clock(TrainerCallback):
        """Notes when each step begins."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            began.append(time.perf_counter())

    config = RLOOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, max_steps=repeats + 2,
        per_device_train_batch_size=TUNING.batch * TUNING.k, num_generations=TUNING.k,
        max_completion_length=TUNING.length, beta=1.0, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    trainer = RLOOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # from the start of a step to the next start; the first step includes preparations
    return [after - before for before, after in zip(began[1:], began[2:])]

# ----------------------------------------------------------------------------------- the main job

def time_main_job(quick: bool, device: str) -> float:
    """Return the seconds of `python train.py --n 4`, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "--n", "4", "--device", device]
        command += ["--quick"] * quick
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, env=os.environ, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
