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

tuned/merged is the policy, a folder that transformers loads; tuned holds the adapter alone, all
held-out responses, and the base model's responses, which another N need not sample again.
"""
import contextlib
import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint
from trl import (ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config,
                 get_quantization_config)

import train
import vbon
from experiments.other_model import NO_TOKEN, OtherModel, pad_left
from support import options, report
from support.files import UnusableInput, check_writable, read_text, write_lines
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
    "reward_weights": None,
    "mask_truncated_completions": False,
    "sync_ref_model": False,            # π_ref stays the base model
    "router_aux_loss_coef": 0.0,        # no other term in the loss
    "weight_decay": 0.0,
    "remove_unused_columns": False,     # the reward needs the column ref_rewards
}

# Much as in train.py. A command line may change them.
DEFAULTS = {
    "use_peft": True,                   # gradient noise raises the KL: train few parameters
    "lora_r": 4,
    "lora_alpha": None,                 # twice lora_r, the ratio of TRL's own defaults
    "lora_target_modules": "all-linear",
    "learning_rate": None,              # .54 / √(number of trained parameters)
    "adam_beta2": 0.99,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": None,        # constant for half of the updates, then along a cosine to 0
    "max_grad_norm": 0.0,               # no clipping
    "max_steps": 200,
    "num_generations": 8,               # K
    "per_device_train_batch_size": 16,  # responses that are scored at a time ...
    "gradient_accumulation_steps": 8,   # ... and 8 times as many in an update: 16 prompts
    "per_device_eval_batch_size": 64,   # responses that are sampled at a time, outside of training
    "max_completion_length": 64,        # tokens
    "bf16": False,                      # a KL is a small difference of log-probabilities
    "logging_steps": 1,
    "report_to": "none",
}


def flag(default: object, text: str):
    """Return a field of a dataclass that becomes a flag with this help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Our own flags."""
    prompts: str = flag(None, "A text file with a prompt a line, or a .jsonl file.")
    reward: str = flag(None, "A Python file that defines reward(prompts, responses).")
    held_out: str = flag(None, "Prompts for the evaluation. Default: every fifth of --prompts.")
    n: int = flag(4, "The N of best-of-N.")
    m: int = flag(64, "The number of the base model's responses to each training prompt.")
    m_eval: int = flag(256, "The number of its responses to each held-out prompt. Half of them "
                       "estimate F, best-of-N has the others, and the policy gives as many.")
    merge: bool = flag(True, "Also leave the policy as one complete model, in OUTPUT_DIR/merged.")


def want(good: bool, message: str) -> None:
    """Raise UnusableInput with the message unless all is good."""
    if not good:
        raise UnusableInput(" ".join(message.split()))


def parse(argv: list[str] | None) -> tuple[Arguments, RLOOConfig, ModelConfig]:
    """Return our arguments and TRL's. Raises UnusableInput for wrong ones."""
    parser = TrlParser([Arguments, RLOOConfig, ModelConfig])
    parser.error = functools.partial(want, False)
    parser.set_defaults_with_config(**VBON, **DEFAULTS)
    try:
        own, args, model_args = parser.parse_args_and_config(argv)
    except (ValueError, OSError) as error:
        raise UnusableInput(" ".join(str(error).split())) from None
    given = vars(model_args) | vars(args)
    for name, value in VBON.items():
        want(given[name] == value, f"--{name} {given[name]}: another objective than vBoN's; want "
                                   f"{value}")
    want(args.steps_per_generation == args.gradient_accumulation_steps,
         "--steps_per_generation: vBoN uses each response in one update; leave it out")
    for name in ("model_name_or_path", "prompts", "reward"):
        want((given | vars(own))[name], f"--{name} is missing")
    want(own.n >= 1 and own.m >= 1, "--n, --m: want at least 1")
    want(own.m_eval >= 2 * own.n, f"--m_eval {own.m_eval}: best of {own.n} needs {2 * own.n}")
    want(model_args.use_peft or model_args.dtype == "float32",
         "--dtype: in half precision, most updates of all weights would be lost; want float32")
    model_args.lora_alpha = model_args.lora_alpha or 2 * model_args.lora_r
    if args.lr_scheduler_type == "warmup_stable_decay" and not args.lr_scheduler_kwargs:
        args.lr_scheduler_kwargs = {"num_decay_steps": args.max_steps // 2}
    return own, args, model_args

# --------------------------------------------------------------------------- vBoN, a reward of TRL

def vbon_reward(file: RewardFile, tokenizer, n: int, *, prompt_text: list[str],
                prompt_ids: list[list[int]], completion_ids: list[list[int]],
                ref_rewards: list[list[float]], trainer_state, log_metric, **_) -> list[float]:
    """Return log π_bon(y) - log π_ref(y) of each response. TRL calls it in each update.

    An entry of each list belongs to one response; the columns of the dataset are among them.
    """
    texts = response_texts(tokenizer, prompt_ids, completion_ids)
    reward = torch.tensor(file.ask(prompt_text, texts), dtype=torch.float64)[:, None]
    ref_rewards = torch.tensor(ref_rewards, dtype=torch.float64)                # (responses, M)
    n = vbon.grow(n, trainer_state.global_step, trainer_state.max_steps)
    log_metric("win_rate", vbon.win_rate(reward, ref_rewards).mean().item())
    return log_weight(reward, ref_rewards, n)[:, 0].tolist()


def log_weight(reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """Return log π_bon(y) - log π_ref(y) (P, K) for rewards (P, K), and (P, M) of π_ref.

    TRL does not tell a reward function what π_ref(y) is. This is the limit π_ref(y) -> 0 of
    `vbon.bon_target`: equal to it where y ties, else the bound (3). On text the two agree.
    """
    improbable = torch.full_like(reward, -1000.0)
    return vbon.bon_target(improbable, reward, ref_rewards, n) - improbable


def response_texts(tokenizer, prompt_ids: list[list[int]], ids: list[list[int]]) -> list[str]:
    """Return the texts that follow the prompts."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True,
                               clean_up_tokenization_spaces=False)
    texts = []
    for before, after in zip(prompt_ids, ids):
        # alone, a response of a Llama would be decoded without its first blank
        texts.append(decode(before + after)[len(decode(before)):])
    return texts

# ------------------------------------------------------------------------------------- the prompts

def read_prompts(path: str) -> list[dict]:
    """Return [{"prompt": a text, or a list of messages}, ...]. Raises UnusableInput."""
    lines = [line for line in read_text(Path(path)).split("\n") if line.strip()]
    if not path.endswith(".jsonl"):
        return [{"prompt": line.removesuffix("\r")} for line in lines]
    rows = []
    for line in lines:
        try:
            prompt = json.loads(line)["prompt"]
            last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        except (ValueError, KeyError, TypeError, IndexError):
            last = None
        want(isinstance(last, str), f'{path}: want objects with "prompt": a text, or a list of '
                                    f'messages; got {line[:60]}')
        rows.append({"prompt": prompt})
    kinds = {type(row["prompt"]) for row in rows}
    want(len(kinds) <= 1, f"{path}: want texts or messages, not both")
    return rows


def encode(rows: list[dict], tokenizer, args: RLOOConfig, room: int | None) -> None:
    """Add to each prompt its text, for the reward, and its tokens, as TRL makes them.

    room: number of tokens that the model has positions for. Raises UnusableInput.
    """
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], str):
        ids = tokenizer(text=prompts)["input_ids"]
    else:
        want(tokenizer.chat_template is not None, "messages need a model with a chat template")
        ids = tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True,
            **(args.chat_template_kwargs or {}))["input_ids"]
    for row, prompt, tokens in zip(rows, prompts, ids):
        row["prompt_text"] = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        row["prompt_ids"] = tokens
    longest = max(rows, key=lambda row: len(row["prompt_ids"]))
    length = len(longest["prompt_ids"]) + args.max_completion_length
    want(room is None or length <= room,
         f"the model has room for {room} tokens, but the prompt {longest['prompt_text'][:40]!r} "
         f"and a response have up to {length}; change --max_completion_length")
    want(all(tokens and tokens[-1] != tokenizer.eos_token_id for tokens in ids),
         "a prompt is empty or ends with the end-of-text token; if this tokenizer appends that, "
         "set add_eos_token to false in its tokenizer_config.json")

# --------------------------------------------------------------------------------------- the model

def read_tokenizer(model_args: ModelConfig, args: RLOOConfig):
    """Return the tokenizer, and the number of tokens that the model has positions for."""
    name = model_args.model_name_or_path
    want(not Path(name, "adapter_config.json").exists(),
         f"{name} is an adapter: merge it into its model first, by merge_and_unload of peft")
    settings = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left",
                                                               **settings)
    except (OSError, ValueError) as error:
        raise UnusableInput(f"--model_name_or_path {name}: {' '.join(str(error).split())}"
                            ) from None
    kind = (config.architectures or [None])[0]
    want(kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or args.trust_remote_code,
         f"--model_name_or_path {name}: {kind} is no causal language model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token            # as TRL does
    want(tokenizer.pad_token is not None, f"{name}: its tokenizer has no end-of-text token")
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def make_trainer(args: RLOOConfig, model_args: ModelConfig, tokenizer, reward) -> RLOOTrainer:
    """Return TRL's trainer, which loads the model. Its dataset comes later."""
    args.model_init_kwargs = {
        "revision": model_args.model_revision, "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation} | (args.model_init_kwargs or {})
    try:
        trainer = RLOOTrainer(
            model=model_args.model_name_or_path, reward_funcs=reward, args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}]), processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args))
    except (ValueError, OSError) as error:
        raise UnusableInput(f"TRL: {' '.join(str(error).split())}") from None
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if args.learning_rate is None:
        # the noise of all parameters together should not grow with their number: see README.md
        args.learning_rate = 0.54 / math.sqrt(sum(p.numel() for p in trained))
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            prepare(wrap(trainer, model), args, tokenizer)
    return trainer


def prepare(model: OtherModel, args: RLOOConfig, tokenizer) -> None:
    """Make TRL score prompts of different lengths as they are sampled, and the model sample from
    its own distribution once it is saved."""
    if "position_ids" in model.takes:
        model.model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)
    model.model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=model.ends,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=model.pad,
        max_new_tokens=args.max_completion_length)


def add_positions(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Count positions from the first token of a prompt, not from its padding.

    `generate` does. TRL passes a mask alone when it scores, which a GPT-2 would not count from.
    """
    mask = kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids")
    if kwargs.get("position_ids") is None and mask is not None and tokens is not None:
        if mask.shape == tokens.shape:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def wrap(trainer: RLOOTrainer, model: torch.nn.Module) -> OtherModel:
    """Return a model with the two methods; its responses end where TRL's do."""
    return OtherModel(model, trainer.eos_token_ids, trainer.processing_class.pad_token_id)


@contextlib.contextmanager
def model_of(trainer: RLOOTrainer, name: str):
    """Give the "policy", or the "reference": the policy with its adapters off, so that there is one
    copy of the weights. Where all weights are trained, TRL has a copy."""
    if name == "reference" and trainer.ref_model is not None:
        yield wrap(trainer, trainer.ref_model)
        return
    adapters_off = contextlib.nullcontext()
    if name == "reference":
        adapters_off = trainer.model.disable_adapter()
    with adapters_off:
        yield wrap(trainer, trainer.model)


@torch.no_grad()
def check_model(trainer: RLOOTrainer, rows: list[dict]) -> None:
    """Raise UnusableInput unless log-probabilities agree when the model samples a response, when it
    scores it behind padding, and alone.

    They do not for models that are not causal, or that look at the padding.
    """
    prompts = sorted((row["prompt_ids"] for row in rows), key=len)
    prompt = pad_left([prompts[0], prompts[-1]], trainer.accelerator.device)
    model = wrap(trainer, trainer.model)
    length = min(8, trainer.args.max_completion_length)
    made = model.model.generate(
        prompt.clamp(min=0), attention_mask=(prompt != NO_TOKEN).long(), max_new_tokens=length,
        min_new_tokens=length, output_logits=True, return_dict_in_generate=True)
    response = made.sequences[:, None, prompt.shape[1]:]                        # (2, 1, L)
    logits = torch.stack(made.logits, 1).float()                                # (2, L, V)
    recorded = logits.log_softmax(-1).gather(2, response.transpose(1, 2))[:, :, 0]
    recorded = (recorded * model.mask(response[:, 0])).sum(-1, dtype=torch.float64)
    padded = model.logprob(prompt, response)[:, 0]
    alone = [model.logprob(pad_left([ids], prompt.device), y[None])[0, 0]
             for ids, y in zip((prompts[0], prompts[-1]), response)]
    found = torch.stack([recorded, padded, torch.stack(alone)])                 # (3, 2)
    largest = (found.max(0).values - found.min(0).values).max().item()
    allowed = 0.05 if trainer.model.dtype == torch.float32 else 1.0
    want(largest < allowed, f"log-probabilities of a short response differ by {largest:.2g} "
                            f"nats when this model samples and scores it, with padding and "
                            f"without: want a causal language model")

# ----------------------------------------------------------------------------------- the responses

@torch.no_grad()
def draw(trainer: RLOOTrainer, file: RewardFile, rows: list[dict], count: int, name: str,
         scored: bool) -> list[dict]:
    """Return `count` responses of a model to each prompt, with rewards and, if scored, their
    log-probabilities under it and the reference. Each process samples its share.

    name: "policy" or "reference".
    """
    args = trainer.args
    device = trainer.accelerator.device
    jobs = []
    for i, row in enumerate(rows):
        jobs += [row | {"prompt_id": i}] * count
    found = []
    began = time.monotonic()
    with trainer.accelerator.split_between_processes(jobs) as mine:
        for start in range(0, len(mine), args.per_device_eval_batch_size):
            part = mine[start:start + args.per_device_eval_batch_size]
            ids = [job["prompt_ids"] for job in part]
            prompt = pad_left(ids, device)
            generator = seeded_generator(device, name, len(rows), args.seed, start,
                                         trainer.accelerator.process_index)
            with model_of(trainer, name) as model:
                response, _ = model.sample(prompt, 1, args.max_completion_length, generator)
            kept = model.mask(response)
            ended = torch.isin(response, torch.tensor(model.ends, device=device)).any(-1)
            texts = [job["prompt_text"] for job in part]
            answers = response_texts(trainer.processing_class, ids,
                                     [y[is_token].tolist() for y, is_token in zip(response, kept)])
            columns = {"prompt_id": [job["prompt_id"] for job in part], "prompt": texts,
                       "response": answers, "reward": file.ask(texts, answers),
                       "cut": (~ended)[:, 0].tolist()}
            if scored:
                columns["logprob"] = score(trainer, name, prompt, response)
                columns["ref_logprob"] = score(trainer, "reference", prompt, response)
            found += [dict(zip(columns, values)) for values in zip(*columns.values())]
            if trainer.accelerator.is_main_process:
                report.show_progress(f"responses of the {name}", start + len(part), len(mine),
                                     began)
    return gather_object(found)


def score(trainer: RLOOTrainer, name: str, prompt: Tensor, response: Tensor) -> list[float]:
    """Return the log-probability of each response (B, 1, L), in nats, a few at a time: the logits
    take more memory than all else."""
    size = trainer.args.per_device_train_batch_size
    found = []
    with model_of(trainer, name) as model:
        for x, y in zip(prompt.split(size), response.split(size)):
            found += model.logprob(x, y)[:, 0].tolist()
    return found


def keep(path: Path, trainer: RLOOTrainer, *args) -> list[dict]:
    """Return what `draw` returns, from the file that an earlier run has left, if there is one."""
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = draw(trainer, *args)
    if trainer.accelerator.is_main_process:
        write_lines(path, found)
    return found


def name_file(own: Arguments, args: RLOOConfig, model_args: ModelConfig, *others) -> str:
    """Return a name for the base model's responses: a hash of what they depend on."""
    folder = Path(model_args.model_name_or_path)
    model = [folder.resolve(), model_args.model_revision, model_args.dtype]
    if folder.is_dir():
        model += [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
                  for path in sorted(folder.iterdir())]
    parts = (model, read_text(Path(own.reward)), args.max_completion_length, args.seed, *others)
    return f"ref-{hashlib.sha256(repr(parts).encode('utf-8')).hexdigest()[:12]}.jsonl"

# -------------------------------------------------------------------------------------- evaluation

def make_table(held: list[dict], found: list[dict], prompts: int, n: int, seed: int
               ) -> tuple[list[dict], Tensor]:
    """Return the rows of reference, best-of-N and vBoN, and the rewards that estimate F (P, M).

    held, found: responses of the base model and of the policy to the held-out prompts.
    """
    # one half estimates F; best-of-N chooses among the others, the candidates
    ref_rewards, reward = matrix(held, "reward", prompts).chunk(2, 1)
    _, logprob = matrix(held, "logprob", prompts).chunk(2, 1)
    groups = reward.shape[1] // n
    best = vbon.best_of_n(reward[:, :groups * n].reshape(-1, n), seeded_generator("cpu", n, seed))
    best = best.view(prompts, groups) + n * torch.arange(groups)
    best_reward = reward.gather(1, best)
    best_logprob = logprob.gather(1, best)
    log_bon = vbon.bon_target(best_logprob, best_reward, ref_rewards, n)
    policy = [matrix(found, name, prompts) for name in ("logprob", "ref_logprob", "reward")]
    rows = []
    for method, samples, numbers, responses in (
            ("ref", 1, (logprob, logprob, reward), held),
            ("bon", n, (log_bon, best_logprob, best_reward), held),
            ("vbon", 1, policy, found)):
        row = {"method": method, "n": n, "samples_per_answer": samples}
        row |= train.metrics(*numbers, ref_rewards, n, numbers[0] - numbers[1])
        row["cut"] = matrix(responses, "cut", prompts).mean().item()
        rows.append(row)
    return rows, ref_rewards


def matrix(responses: list[dict], name: str, prompts: int) -> Tensor:
    """Return a number of each response (P, K)."""
    return torch.tensor([one[name] for one in responses], dtype=torch.float64).view(prompts, -1)

# ----------------------------------------------------------------------------------------- the run

def main(argv: list[str] | None = None) -> list[dict]:
    """Train with TRL, evaluate on held-out prompts, and leave the policy. Returns the table."""
    own, args, model_args = parse(argv)
    out = Path(args.output_dir)
    check_writable(out)

    # ---- inputs: what can be wrong is looked at before the model is loaded
    file = RewardFile(own.reward)
    rows = read_prompts(own.prompts)
    held_out = rows[::5]
    if own.held_out is None:
        rows = [row for i, row in enumerate(rows) if i % 5 != 0]
    else:
        held_out = read_prompts(own.held_out)
    in_update = args.generation_batch_size // args.num_generations
    want(len(held_out) >= 8, f"{len(held_out)} held-out prompts: want at least 8")
    want(len(rows) >= in_update, f"{len(rows)} training prompts, but {in_update} in an update: "
                                 f"want more, or a smaller --gradient_accumulation_steps")
    tokenizer, room = read_tokenizer(model_args, args)
    encode(rows, tokenizer, args, room)
    encode(held_out, tokenizer, args, room)
    some = [row["prompt_text"] for row in rows[:8]]
    file.ask(some, some[::-1])
    trainer = make_trainer(args, model_args, tokenizer,
                           functools.partial(vbon_reward, file, tokenizer, own.n))
    check_model(trainer, rows + held_out)

    # ---- reference responses: their rewards estimate F
    path = out / name_file(own, args, model_args, rows, own.m)
    drawn = keep(path, trainer, file, rows, own.m, "reference", False)
    path = out / name_file(own, args, model_args, held_out, own.m_eval)
    held = keep(path, trainer, file, held_out, own.m_eval, "reference", True)
    for i, row in enumerate(rows):
        row["ref_rewards"] = [one["reward"] for one in drawn[i * own.m:(i + 1) * own.m]]
    trainer.train_dataset = Dataset.from_list(rows)
    say = trainer.accelerator.print
    say(f"{len(rows)} prompts to train on, {len(held_out)} held-out prompts")
    say(f"the first prompt: {rows[0]['prompt_text']!r}")
    say(f"the base model: {drawn[0]['response']!r}, with reward {drawn[0]['reward']:.3g}")
    if own.m < own.n:
        say(f"note: {own.m} reference samples are few for n = {own.n}; raise --m")
    if isinstance(rows[0]["prompt"], str) and ("<|" in some[0] or "[INST]" in some[0]):
        say("the prompts seem to hold a chat template: messages in a .jsonl file would be safer")

    # ---- fine-tuning, by TRL
    checkpoint = args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = get_last_checkpoint(out)               # the first time there is none
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # ---- evaluation: on held-out prompts
    found = draw(trainer, file, held_out, own.m_eval // 2, "policy", True)
    table, ref_rewards = make_table(held, found, len(held_out), own.n, args.seed)
    if trainer.accelerator.is_main_process:
        report.print_table(table, ref_rewards, args.max_completion_length)
        for name, method, responses in (("reference", "ref", held), ("policy", "vbon", found)):
            lines = [{"method": method} | one
                     | {"token_kl": one["logprob"] - one["ref_logprob"]} for one in responses]
            write_lines(out / f"responses-{name}.jsonl", lines)
        if own.merge and trainer.ref_model is None:
            # in half precision, the sum of a weight and its small change would lose the change
            trainer.model.float().merge_and_unload().save_pretrained(out / "merged")
            tokenizer.save_pretrained(out / "merged")
    trainer.accelerator.wait_for_everyone()
    return table


if __name__ == "__main__":
    options.run(main, "with_trl")
