"""with_trl.py: vBoN for any causal model of transformers, with the trainer of the library TRL.

    python -m experiments.with_trl --model_name_or_path FOLDER --prompts prompts.txt \\
        --reward reward.py --n 4 --output_dir tuned

TRL's RLOOTrainer gives each response the score (reward - beta · KL) and subtracts the mean score of
the other K - 1. Its KL is log π_θ - log π_ref, summed over the response. So with beta = 1 and the
reward log π_bon - log π_ref, this is the bracket of equation (6): vBoN is a reward function of TRL,
`vbon_reward`. All flags of TRL's RLOOConfig and ModelConfig work.

prompts.txt has a prompt a line. prompts.jsonl has objects with TRL's column "prompt": a text, or a
list of messages, to which the model's chat template is applied. reward.py defines
reward(prompts, responses), as for train.py; of messages, it gets the text of the last one.
tuned/merged is the policy, a folder that transformers loads; tuned has its adapter and responses.
"""
import contextlib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.hf_argparser import HfArg
from trl import (ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config,
                 get_quantization_config)

import train
import vbon
from experiments.other_model import NO_TOKEN, OtherModel, pad_left
from support import options, report
from support.files import UnusableInput, check_writable, read_text, write_lines
from support.kept import digest
from support.own_reward import RewardFile
from support.sampling import seeded_generator

# ------------------------------------------------------------------------------------ the settings

# With these values, TRL's objective is (5). Others are refused.
VBON = {
    "beta": 1.0,                        # the score is reward - KL
    "num_iterations": 1,                # each response is used once, so that the ratio is 1 ...
    "temperature": 1.0,                 # ... and comes from the distribution that is scored
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "disable_dropout": True,
    "lora_dropout": 0.0,
    "normalize_advantages": False,      # the score is used as it is
    "reward_clip_range": None,
    "mask_truncated_completions": False,
    "router_aux_loss_coef": 0.0,        # no other term in the loss
    "use_peft": True,                   # the policy without adapters is π_ref: no second model
}

# Much as in train.py. A command line may change them.
DEFAULTS = {
    "lora_r": 4,                        # gradient noise raises the KL: train few parameters
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "learning_rate": None,              # .54 / √(number of trained parameters)
    "adam_beta2": 0.99,
    "lr_scheduler_type": "warmup_stable_decay",     # from the middle on, along a cosine to 0
    "max_grad_norm": 1.0,               # one response with a low F must not dominate
    "max_steps": 200,
    "num_generations": 8,               # K
    "per_device_train_batch_size": 16,  # responses that are scored at a time ...
    "gradient_accumulation_steps": 8,   # ... and 8 times as many in an update: 16 prompts
    "per_device_eval_batch_size": 32,   # responses to sample and score at a time, outside training
    "max_completion_length": 64,        # tokens
    "bf16": False,                      # a KL is a small difference of log-probabilities
}


@dataclass
class Arguments:
    """Our own flags."""
    prompts: str = HfArg(help="A text file with a prompt a line, or a .jsonl file.")
    reward: str = HfArg(help="A Python file that defines reward(prompts, responses).")
    held_out: str = HfArg(default=None, help="Other prompts. Default: every fifth of --prompts.")
    n: int = HfArg(default=4, help="The N of best-of-N.")
    m: int = HfArg(default=64, help="Responses of the base model to each training prompt.")
    m_eval: int = HfArg(default=128, help="Responses to each held-out prompt: of the base model to "
                        "estimate F, of the base model for best-of-N, and of the policy.")
    merge: bool = HfArg(default=True, help="Also leave the complete policy, in tuned/merged.")

# --------------------------------------------------------------------------- vBoN, a reward of TRL

def vbon_reward(file: RewardFile, tokenizer, ends: list[int], n: int, *, prompt_text: list[str],
                prompt_ids: list[list[int]], completion_ids: list[list[int]],
                ref_rewards: list[list[float]], trainer_state, log_metric, **_) -> list[float]:
    """Return log π_bon(y) - log π_ref(y) of each response. TRL calls it in each update.

    An entry of each list belongs to one response; the columns of the dataset are among them.
    """
    texts = response_texts(tokenizer, ends, prompt_ids, completion_ids)
    reward = torch.tensor(file.ask(prompt_text, texts), dtype=torch.float64)[:, None]
    ref_rewards = torch.tensor(ref_rewards, dtype=torch.float64)                # (responses, M)
    log_metric("win_rate", vbon.win_rate(reward, ref_rewards).mean().item())
    n = vbon.grow(n, trainer_state.global_step, trainer_state.max_steps)
    # TRL does not tell π_ref(y). Its limit 0 gives (4) where y ties, else the bound (3).
    ref_logprob = torch.full_like(reward, -1000.0)
    log_target = vbon.bon_target(ref_logprob, reward, ref_rewards, n)
    return (log_target - ref_logprob)[:, 0].tolist()


def end_tokens(model, tokenizer) -> list[int]:
    """Return the tokens that end a response, as TRL finds them."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [i for i in {tokenizer.eos_token_id, *ends} if i is not None]


def response_texts(tokenizer, ends: list[int], prompt_ids: list[list[int]], ids: list[list[int]]
                   ) -> list[str]:
    """Return the texts that follow the prompts, with all markers in them but the end."""
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    texts = []
    for before, after in zip(prompt_ids, ids):
        if after[-1] in ends:
            after = after[:-1]
        # alone, a response of a Llama would be decoded without its first blank
        texts.append(decode(before + after)[len(decode(before)):])
    return texts

# ----------------------------------------------------------------------------------------- the run

def main(argv: list[str] | None = None) -> list[dict]:
    """Train with TRL, evaluate on held-out prompts, and leave the policy. Returns the table."""
    own, args, model_args = parse(argv)
    out = Path(args.output_dir)
    check_writable(out)

    # ---- inputs: what can be wrong is looked at before the long work
    file = RewardFile(own.reward)
    name = model_args.model_name_or_path
    settings = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    want(not (Path(name) / "adapter_config.json").exists(), f"--model_name_or_path {name}: an "
         f"adapter; want a complete model, such as merge_and_unload() of peft makes")
    with refused(f"--model_name_or_path {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **settings)
    rows = read_prompts(own.prompts, tokenizer, args)
    if own.held_out is not None:
        held_out = read_prompts(own.held_out, tokenizer, args)
    else:
        held_out = rows[::5]
        del rows[::5]
    least = args.generation_batch_size // args.num_generations
    want(len(rows) >= least and len(held_out) >= 8, f"want {least} prompts, those of an update, "
         f"and 8 held-out ones; got {len(rows)} and {len(held_out)}")
    some = [row["prompt_text"] for row in rows[:8]]
    file.ask(some, some[::-1])
    with refused(f"--model_name_or_path {name}"):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args), **settings,
            **(args.model_init_kwargs or {}))
    tokens = model.get_input_embeddings().weight.shape[0]
    want((tokenizer.pad_token_id or 0) < tokens, f"--model_name_or_path {name}: the token "
         f"{tokenizer.pad_token} that pads is not among the {tokens} of the model")

    # ---- TRL's trainer, with vBoN as its reward
    with refused("TRL"):
        trainer = RLOOTrainer(
            model=model, args=args, reward_funcs=functools.partial(
                vbon_reward, file, tokenizer, end_tokens(model, tokenizer), own.n),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=get_peft_config(model_args))
    if args.learning_rate is None:
        # the noise of all parameters together should not grow with their number: see README.md
        trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
        args.learning_rate = 0.54 / math.sqrt(sum(trained))
    policy = OtherModel(trainer.model, trainer.eos_token_ids, tokenizer.pad_token_id)
    policy.model.generation_config.max_new_tokens = args.max_completion_length
    check_model(policy, rows + held_out, args.max_completion_length)

    # ---- reference responses: their rewards estimate F; best-of-N has others, the candidates
    # Before training, the adapters change nothing: the policy is the reference.
    changes = [path.stat().st_mtime for path in sorted(Path(name).glob("*"))]
    key = digest(name, changes, model_args.model_revision, model_args.dtype, file, rows, held_out,
                 own.m, own.m_eval, args.max_completion_length, args.seed)
    kept = out / f"reference-{key}"
    draw_more = functools.partial(draw, trainer, policy, file)
    drawn = draw_more(rows, own.m, kept / "responses-training.jsonl", False)
    held = draw_more(held_out, own.m_eval, kept / "responses-held-out.jsonl", False)
    candidates = draw_more(held_out, own.m_eval, kept / "responses-candidates.jsonl", True)
    for i, row in enumerate(rows):
        row["ref_rewards"] = [one["reward"] for one in drawn[i * own.m:(i + 1) * own.m]]
    trainer.accelerator.print(f"a response of the base model: {drawn[0]}")

    # ---- fine-tuning, by TRL
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()

    # ---- evaluation: on held-out prompts
    path = out / "responses-policy.jsonl"
    path.unlink(missing_ok=True)                        # of an earlier policy
    found = draw_more(held_out, own.m_eval, path, True)
    table, ref_rewards = make_table(held, candidates, found, len(held_out), own.n)
    if trainer.accelerator.is_main_process:
        report.print_table(table, ref_rewards, args.max_completion_length)
    if trainer.accelerator.is_main_process and own.merge:
        # in half precision, the sum of a weight and its small change would lose the change
        trainer.model.float().merge_and_unload().save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    return table

# ---------------------------------------------------------------------------- the parts of the run

def want(good: bool, message: str) -> None:
    """Raise UnusableInput with the message, in one line, unless all is good."""
    if not good:
        raise UnusableInput(" ".join(message.split()))


@contextlib.contextmanager
def refused(what: str):
    """Raise UnusableInput, in one line, for errors in the `with` block."""
    try:
        yield
    except Exception as error:          # a library's own kinds; tokenizers raise Exception itself
        want(False, f"{what}: {error}")


def parse(argv: list[str] | None) -> tuple[Arguments, RLOOConfig, ModelConfig]:
    """Return our arguments and TRL's. Raises UnusableInput for wrong ones."""
    parser = TrlParser([Arguments, RLOOConfig, ModelConfig])
    parser.error = functools.partial(want, False)
    parser.set_defaults_with_config(**VBON, **DEFAULTS)
    with refused("arguments"):
        own, args, model_args = parser.parse_args_and_config(argv)
    given = vars(model_args) | vars(args)
    for name, value in VBON.items():
        want(given[name] == value, f"--{name} {given[name]}: vBoN's objective wants {value}")
    want(args.steps_per_generation == args.gradient_accumulation_steps,
         "--steps_per_generation: vBoN uses each response in one update; leave it out")
    want(args.output_dir, "--output_dir is empty")
    want(own.n >= 1 and own.m >= 1 and own.m_eval >= 1 and own.m_eval % own.n == 0,
         f"--n {own.n} --m {own.m} --m_eval {own.m_eval}: want a multiple of n as m_eval, all >= 1")
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        args.lr_scheduler_kwargs = {"num_decay_steps": args.max_steps // 2}
    return own, args, model_args


def read_prompts(path: str, tokenizer, args: RLOOConfig) -> list[dict]:
    """Return rows for TRL: prompt, text for the reward, tokens. Raises UnusableInput."""
    lines = [line for line in read_text(Path(path)).split("\n") if line.strip()]
    rows = []
    for line in lines:
        with refused(f'{path}: want "prompt": a text, or a list of messages; got {line[:60]}'):
            prompt = json.loads(line)["prompt"] if path.endswith(".jsonl") else line
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            ids = prompt_tokens(prompt, tokenizer, args)
        want(ids, f"{path}: a prompt without a token: {line[:60]}")
        rows.append({"prompt": prompt, "prompt_text": text, "prompt_ids": ids})
    for mark in ("<|im_start|>", "[INST]", "<|start_header_id|>", "<start_of_turn>", "<|user|>"):
        if any(isinstance(row["prompt"], str) and mark in row["prompt"] for row in rows):
            print(f"{path} has {mark} in a text: give a chat as messages, in a .jsonl file")
    return rows


def prompt_tokens(prompt: str | list[dict], tokenizer, args: RLOOConfig) -> list[int]:
    """Return the tokens of a prompt, as TRL makes them."""
    if not isinstance(prompt, str):
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True,
            **(args.chat_template_kwargs or {}))["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("the tokenizer begins texts itself: leave out the first token")
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise ValueError("the tokenizer ends each text (add_eos_token?): nothing would follow")
    return ids


@torch.no_grad()
def check_model(policy: OtherModel, rows: list[dict], length: int) -> None:
    """Raise UnusableInput if prompt and response are too long, or log-probabilities differ when the
    model samples a response, when it scores it behind padding, and alone.

    They differ for models that are not causal, or that look at the padding.
    """
    prompts = sorted((row["prompt_ids"] for row in rows), key=len)
    room = getattr(policy.model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = len(prompts[-1])
    want(longest + length <= room, f"a prompt of {longest} tokens and a response of {length}, but "
                                   f"the model has room for {room}; shorten one of them")
    pair = [prompts[0], prompts[-1]]
    prompt = pad_left(pair, policy.model.device)
    length = min(8, length)
    made = policy.model.generate(
        prompt.clamp(min=0), attention_mask=(prompt != NO_TOKEN).long(), max_new_tokens=length,
        min_new_tokens=length, output_logits=True, return_dict_in_generate=True)
    response = made.sequences[:, None, prompt.shape[1]:]                        # (2, 1, L)
    logits = torch.stack(made.logits, 1)                                        # (2, L, V)
    sampled = logits.log_softmax(-1).gather(2, response.transpose(1, 2)).double().sum((1, 2))
    padded = policy.logprob(prompt, response)[:, 0]
    alone = [policy.logprob(pad_left([ids], prompt.device), y[None])[0, 0]
             for ids, y in zip(pair, response)]
    found = torch.stack([sampled, padded, torch.stack(alone)])                  # (3, 2)
    largest = (found.amax(0) - found.amin(0)).max().item()
    want(largest < (0.05 if policy.model.dtype == torch.float32 else 1.0),
         f"log-probabilities of a short response differ by {largest:.2g} nats when this model "
         f"samples it, scores it behind padding, and alone: want a causal language model")


@torch.no_grad()
def draw(trainer: RLOOTrainer, policy: OtherModel, file: RewardFile, rows: list[dict], count: int,
         path: Path, scored: bool) -> list[dict]:
    """Return `count` responses of the policy to each prompt, with rewards and, if scored, their
    log-probabilities under it and the reference. They are kept in the file `path`."""
    if path.exists():
        return [json.loads(line) for line in read_text(path).split("\n") if line]
    args = trainer.args
    policy.eval()                       # in training mode, `generate` would recompute all tokens
    prompt_ids = torch.arange(len(rows)).repeat_interleave(count).tolist()
    found = []
    with trainer.accelerator.split_between_processes(prompt_ids) as mine:
        for start in tqdm(range(0, len(mine), args.per_device_eval_batch_size), path.name):
            part = mine[start:start + args.per_device_eval_batch_size]
            ids = [rows[i]["prompt_ids"] for i in part]
            prompts = [rows[i]["prompt_text"] for i in part]
            prompt = pad_left(ids, trainer.accelerator.device)
            generator = seeded_generator(prompt.device, path.name, args.seed, start,
                                         trainer.accelerator.process_index)
            response, _ = policy.sample(prompt, 1, args.max_completion_length, generator)
            kept = [y[is_token].tolist() for y, is_token in zip(response, policy.mask(response))]
            texts = response_texts(trainer.processing_class, policy.ends, ids, kept)
            columns = {"prompt_id": part, "prompt": prompts, "response": texts,
                       "reward": file.ask(prompts, texts),
                       "cut": [y[-1] not in policy.ends for y in kept]}
            if scored:
                with trainer.model.disable_adapter():
                    columns["ref_logprob"] = policy.logprob(prompt, response)[:, 0].tolist()
                columns["logprob"] = columns["ref_logprob"]
                if trainer.state.global_step > 0:       # before, the adapters change nothing
                    columns["logprob"] = policy.logprob(prompt, response)[:, 0].tolist()
            found += [dict(zip(columns, values)) for values in zip(*columns.values())]
    found = gather_object(found)
    if trainer.accelerator.is_main_process:
        write_lines(path, found)
    return found


def make_table(held: list[dict], candidates: list[dict], found: list[dict], prompts: int, n: int
               ) -> tuple[list[dict], torch.Tensor]:
    """Return the rows of reference, best-of-N and vBoN, and the rewards that estimate F (P, M).

    held, candidates: responses of the base model to the held-out prompts. found: the policy's.
    """
    ref_rewards = matrix(held, "reward", prompts)
    best = [max(candidates[i:i + n], key=lambda one: one["reward"])
            for i in range(0, len(candidates), n)]
    rows = []
    for method, size, responses in (("ref", 1, candidates), ("bon", n, best), ("vbon", 1, found)):
        logprob, ref_logprob, reward, is_cut = [matrix(responses, name, prompts) for name in
                                                ("logprob", "ref_logprob", "reward", "cut")]
        if method == "bon":
            logprob = vbon.bon_target(ref_logprob, reward, ref_rewards, n)
        row = train.metrics(logprob, ref_logprob, reward, ref_rewards, n, logprob - ref_logprob)
        rows.append(row | {"method": method, "n": n, "samples_per_answer": size,
                           "cut": is_cut.mean().item()})
    return rows, ref_rewards


def matrix(responses: list[dict], name: str, prompts: int) -> torch.Tensor:
    """Return a number of each response (P, K)."""
    return torch.tensor([one[name] for one in responses], dtype=torch.float64).view(prompts, -1)


if __name__ == "__main__":
    options.run(main, "with_trl")
