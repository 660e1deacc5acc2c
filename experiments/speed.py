"""speed.py: our sampling beside transformers' generate, our update beside TRL's RLOOTrainer.

    pip install transformers trl
    python -m experiments.speed

All on the CPU, in turn on one machine, medians of 5. It also prints the versions, and how the time
of `python train.py --n 4` compares with that of its matrix products alone.
"""
import argparse
import importlib.metadata
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
from experiments.studies import any_reward
from model import GPT, add_adapters
from support.reviews import builtin_reviews
from support.tokenizer import encode, save_tokenizer, train_tokenizer

# layers, width, heads, vocabulary, responses
SIZES = ((2, 64, 2, 768, 512), (4, 128, 4, 2048, 512), (12, 768, 12, 50257, 64))
TEXT = train.Settings().text
REFERENCE = train.Settings().reference
TUNING = train.Settings().tuning
ROOT = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Only to see that it runs.")
    args = parser.parse_args(argv)
    repeats = 1 if args.quick else 5
    sizes = SIZES[:1] if args.quick else SIZES
    peak = matmul_peak()
    versions = [f"{name} {importlib.metadata.version(name)}"
                for name in ("torch", "transformers", "trl")]
    print(f"Python {platform.python_version()}, {', '.join(versions)}; {torch.get_num_threads()} "
          f"threads; a float32 product runs at {peak / 1e9:.0f} GFLOP/s")

    print(f"\n{'sampling responses of 24 tokens':36}{'generate':>21}{'ours':>21}{'times':>7}")
    for layers, width, heads, vocab, responses in sizes:
        theirs, ours = time_sampling(layers, width, heads, vocab, responses, repeats)
        name = f"{layers} layers of width {width}, {responses} at a time"
        print(f"{name:36}{spread(theirs):>21}{spread(ours):>21}{ratio(theirs, ours):7.1f}")

    print(f"\n{'one update, 512 responses':36}{'RLOOTrainer':>21}{'ours':>21}{'times':>7}")
    with tempfile.TemporaryDirectory() as folder:
        ours = time_our_update(repeats)
        theirs = time_rloo(Path(folder), repeats)
    print(f"{'2 layers of width 64':36}{spread(theirs):>21}{spread(ours):>21}"
          f"{ratio(theirs, ours):7.1f}")

    seconds = time_main_job(args.quick)
    arithmetic = main_job_operations() / peak
    print(f"\npython train.py --n 4 takes {seconds:.0f} s; its matrix products alone would take "
          f"{arithmetic:.0f} s:\n{seconds / arithmetic:.1f} times")


def measure(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(seconds: list[float]) -> str:
    """Format the median, the fastest and the slowest."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as fast ours is, by the medians."""
    return statistics.median(theirs) / statistics.median(ours)


def matmul_peak() -> float:
    """Return the operations per second of a large matrix product, the best of several."""
    x = torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / min(measure(lambda: x @ x) for _ in range(20))

# ------------------------------------------------------------------------ beside transformers

def time_sampling(layers: int, width: int, heads: int, vocab: int, responses: int, repeats: int
                  ) -> tuple[list[float], list[float]]:
    """Return seconds of generate and of our `sample`, in turn, with the same random weights."""
    from transformers import AutoModelForCausalLM
    generator = torch.Generator().manual_seed(0)
    room = TEXT.prompt_tokens + TEXT.length
    model = GPT(vocab, room, layers, heads, width, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(vocab - 1, (responses // TUNING.k, TEXT.prompt_tokens),
                           generator=generator)
    rows = prompt.repeat_interleave(TUNING.k, 0)

    def theirs() -> Tensor:
        # the full softmax at temperature 1, as in our `sample`
        return other.generate(rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0,
                              top_p=1.0, temperature=1.0, max_new_tokens=TEXT.length,
                              pad_token_id=model.eot)

    def ours() -> tuple[Tensor, Tensor]:
        return model.sample(prompt, TUNING.k, TEXT.length, generator)

    # the first call includes preparations
    theirs()
    ours()
    seconds = [(measure(theirs), measure(ours)) for _ in range(repeats)]
    return [pair[0] for pair in seconds], [pair[1] for pair in seconds]

# ------------------------------------------------------------------------------------ beside TRL

def small_world() -> tuple:
    """Return tokenizer, model and 64 prompts of the main job; the model is not trained."""
    texts = [text for text, _ in builtin_reviews(TEXT.reviews, 0)]
    encoding = train_tokenizer(texts[:2000], TEXT.vocab)
    room = TEXT.prompt_tokens + TEXT.length
    model = GPT(encoding.n_vocab, room, REFERENCE.layers, REFERENCE.heads, REFERENCE.width,
                generator=torch.Generator().manual_seed(0))
    model.untie_head()
    prompt = encode(encoding, texts[:TUNING.batch], TEXT.prompt_tokens)
    return encoding, model, prompt


def time_our_update(repeats: int) -> list[float]:
    """Return the seconds of updates with adapters, as in the main job."""
    _, reference, prompt = small_world()
    _, policy, _ = small_world()
    generator = torch.Generator().manual_seed(0)
    trained = add_adapters(policy, TUNING.rank, generator)
    optimizer = torch.optim.Adam(trained, lr=TUNING.lr, fused=True)
    ref_rewards = torch.randn(len(prompt), 64, generator=generator)
    # late in training: n has its full size
    batch = train.Batch(TUNING.steps, prompt, None, ref_rewards)

    def update() -> None:
        optimizer.zero_grad()
        train.vbon_gradient(policy, reference, any_reward, batch, 4, TUNING, generator)
        optimizer.step()

    update()
    return [measure(update) for _ in range(repeats)]


def time_rloo(folder: Path, repeats: int) -> list[float]:
    """Return the seconds of TRL's RLOOTrainer for a step: the same model, prompts and sizes, but
    all weights are trained."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer
    encoding, model, prompt = small_world()
    model.save_pretrained(folder)
    save_tokenizer(encoding, folder)
    texts = [encoding.decode(ids) for ids in prompt.tolist()]
    began = []

    class Clock(TrainerCallback):
        """Notes when each step begins."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            began.append(time.perf_counter())

    config = RLOOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, max_steps=repeats + 2,
        per_device_train_batch_size=TUNING.batch * TUNING.k, num_generations=TUNING.k,
        max_completion_length=TEXT.length, beta=1.0, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    trainer = RLOOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=config, train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()])
    trainer.train()
    # from the start of a step to the next start; the first step includes preparations
    return [after - before for before, after in zip(began[1:], began[2:])]

# ----------------------------------------------------------------------------------- the main job

def time_main_job(quick: bool) -> float:
    """Return the seconds of `python train.py --n 4`, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "--n", "4"] + ["--quick"] * quick
        return measure(lambda: subprocess.run(command, cwd=folder, env=os.environ, check=True,
                                              stdout=subprocess.DEVNULL))


def main_job_operations() -> int:
    """Return the operations of its matrix products, if all responses had the full length.

    A weight takes 2 operations for each token in a forward pass, and 4 in a backward pass.
    """
    settings = train.Settings()
    text = settings.text
    samples = settings.samples
    evaluation = settings.evaluation
    weights = 12 * REFERENCE.layers * REFERENCE.width ** 2 + text.vocab * REFERENCE.width
    tokens = text.prompt_tokens + text.length
    reference = REFERENCE.lm_steps * REFERENCE.lm_batch * 6
    sampled = (text.prompts * samples.m + 2 * text.held_prompts * samples.m_eval) * 2
    updates = TUNING.steps * TUNING.batch * TUNING.k * (2 + 2 + 6)
    evaluated = text.held_prompts * evaluation.k_eval * (2 + 2 + 4)
    return weights * tokens * (reference + sampled + updates + evaluated)


if __name__ == "__main__":
    main()
