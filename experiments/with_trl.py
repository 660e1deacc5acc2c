"""with_trl.py: vBoN for any causal model of transformers, with the trainer of the library TRL.

    pip install trl peft
    python -m experiments.with_trl --model_name_or_path FOLDER --prompts prompts.txt \\
        --reward reward.py --n 4 --output_dir tuned

TRL's RLOOTrainer gives each response the score (reward - beta · KL), where KL is log π_θ - log π_ref
summed over its tokens, and subtracts the mean score of the other K - 1. With beta = 1 and the
reward log π_bon - log π_ref, this is the bracket of equation (6): vBoN is a reward function for TRL
(`vbon_reward`, below). All flags of RLOOConfig and ModelConfig work; the defaults are below.

prompts.txt has a prompt a line; prompts.jsonl has objects with TRL's column "prompt", a text or a
list of messages, to which the model's chat template is applied. reward.py defines
reward(prompts, responses), as for train.py. For messages, it gets the text of the last one.

Afterwards DIR holds the adapter, DIR/merged the policy as a folder that transformers loads,
DIR/responses-*.jsonl all held-out responses, and DIR/ref-*.json the rewards of the base model.

    accelerate launch --num_processes 8 -m experiments.with_trl ...            several GPUs
    ... --bf16 True --use_vllm True --vllm_mode colocate                       vLLM samples (not run)
    accelerate launch --use_deepspeed --zero_stage 2 -m experiments.with_trl ...  (not run)
"""
import contextlib
import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from trl import (ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config,
                 get_quantization_config)

import train
import vbon
from experiments.other_model import NO_TOKEN, OtherModel, pad_left
from support import options, report
from support.announce import wins_of_target
from support.files import UnusableInput, check_writable, read_text
from support.own_reward import RewardFile
from support.records import write_lines
from support.seeding import seeded_generator

# ------------------------------------------------------------------------------------ the settings

@dataclass
class Arguments:
    """Our own flags."""
    prompts: str = field(metadata={"help": "The prompts: a text file with one a line, or .jsonl."})
    reward: str = field(metadata={"help": "A Python file with reward(prompts, responses)."})
    held_out: str | None = field(default=None, metadata={
        "help": "Prompts for the evaluation. Default: every fifth prompt of --prompts."})
    n: int = field(default=4, metadata={"help": "The N of best-of-N."})
    m: int = field(default=64, metadata={
        "help": "The number of the base model's responses to each training prompt."})
    m_eval: int = field(default=256, metadata={
        "help": "The same for held-out prompts. One half estimates F; best-of-N has the other."})
    k_eval: int = field(default=64, metadata={
        "help": "The number of the policy's responses to each held-out prompt."})
    merge: bool = field(default=True, metadata={
        "help": "Also save base model and adapter as one model, in the folder merged."})


# With these, TRL's objective is (5). They are flags of TRL, but no other value is accepted.
VBON = {
    "beta": 1.0,                        # the score is reward - KL
    "num_iterations": 1,                # each response is used once, so that the ratio is 1 ...
    "temperature": 1.0,                 # ... and is sampled from the distribution that is scored
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "disable_dropout": True,            # sampled and scored by the same model
    "lora_dropout": 0.0,
    "normalize_advantages": False,      # the score is used as it is
    "reward_clip_range": None,
    "reward_weights": None,
    "mask_truncated_completions": False,
    "sync_ref_model": False,            # π_ref stays the base model
    "remove_unused_columns": False,     # the reward needs `ref_rewards`
}

# As in train.py, where they can be. A command line or a --config file may change them.
DEFAULTS = {
    "use_peft": True,                   # gradient noise raises the KL: train few parameters
    "lora_r": 4,
    "lora_alpha": None,                 # as lora_r: the adapter is B A, not scaled
    "lora_target_modules": "all-linear",
    "learning_rate": None,              # .54 / √(number of trained parameters)
    "adam_beta2": 0.99,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0,               # Adam divides by the gradient's size already
    "max_steps": 200,
    "num_generations": 8,               # K
    "per_device_train_batch_size": 16,  # responses scored at a time, with gradients
    "gradient_accumulation_steps": 8,   # 16 · 8 responses an update: 16 prompts
    "per_device_eval_batch_size": 64,   # responses sampled or scored at a time, without gradients
    "max_completion_length": 64,
    "bf16": False,                      # the KL is a difference of log-probabilities
    "logging_steps": 1,
    "report_to": "none",
}


def parse(argv: list[str] | None) -> tuple[Arguments, RLOOConfig, ModelConfig]:
    """Return our arguments and TRL's. Raises UnusableInput for wrong ones."""
    parser = TrlParser([Arguments, RLOOConfig, ModelConfig])
    parser.error = _refuse
    parser.set_defaults_with_config(**VBON, **DEFAULTS)
    try:
        own, args, model_args = parser.parse_args_and_config(argv)
    except (ValueError, OSError) as error:
        raise UnusableInput(" ".join(str(error).split())) from None
    for name, wanted in VBON.items():
        found = getattr(args, name, getattr(model_args, name, None))
        if found != wanted:
            raise UnusableInput(f"--{name} {found}: that is not vBoN's objective; want {wanted}")
    if args.steps_per_generation != args.gradient_accumulation_steps:
        raise UnusableInput("--steps_per_generation: each response is used for one update; want "
                            "that of --gradient_accumulation_steps")
    for name, least in (("n", 1), ("m", 1), ("m_eval", 2 * own.n), ("k_eval", 1)):
        if getattr(own, name) < least:
            raise UnusableInput(f"--{name} {getattr(own, name)}: want at least {least}")
    if model_args.lora_alpha is None:
        model_args.lora_alpha = model_args.lora_r
    return own, args, model_args


def _refuse(message: str) -> None:
    raise UnusableInput(message)

# ------------------------------------------------------------------------------ vBoN, as a reward

def log_weight(reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """Return log π_bon(y) - log π_ref(y) (P, K) from rewards (P, K) and those of π_ref (P, M).

    TRL does not tell a reward function π_ref(y). This is the limit π_ref(y) -> 0 of `bon_target`:
    the same where rewards tie, and the bound (3) where they do not. On text the two agree.
    """
    improbable = torch.full_like(reward, -1000.0)
    return vbon.bon_target(improbable, reward, ref_rewards, n) - improbable


def vbon_reward(file: RewardFile, tokenizer, n: int, *, prompt_text: list[str],
                prompt_ids: list[list[int]], completion_ids: list[list[int]],
                ref_rewards: list[list[float]], trainer_state, log_metric, **_) -> list[float]:
    """Return the reward that makes TRL's score the bracket of (6). TRL calls it in each update.

    One entry of each list is for one response. The columns of the dataset are repeated for it.
    """
    responses = response_texts(tokenizer, prompt_ids, completion_ids)
    reward = torch.tensor(file.ask(prompt_text, responses), dtype=torch.float64)[:, None]
    ref_rewards = torch.tensor(ref_rewards, dtype=torch.float64)                # (responses, M)
    n = vbon.grow(n, trainer_state.global_step, trainer_state.max_steps)
    log_metric("win_rate", vbon.win_rate(reward, ref_rewards).mean().item())
    return log_weight(reward, ref_rewards, n)[:, 0].tolist()


def response_texts(tokenizer, prompt_ids: list[list[int]], ids: list[list[int]]) -> list[str]:
    """Return the text that each response adds to its prompt.

    A Llama's tokenizer decodes a response alone without its first blank.
    """
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = []
    for before, after in zip(prompt_ids, ids):
        start = tokenizer.decode(before, **settings)
        texts.append(tokenizer.decode(before + after, **settings)[len(start):])
    return texts

# ------------------------------------------------------------------------------------- the prompts

def read_prompts(path: str) -> list[dict]:
    """Return [{"prompt": a text or a list of messages}, ...]. Raises UnusableInput."""
    lines = [line.removesuffix("\r") for line in read_text(Path(path)).split("\n")]
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not path.endswith(".jsonl"):
        return [{"prompt": line} for _, line in lines]
    rows = []
    for number, line in lines:
        try:
            prompt = json.loads(line)["prompt"]
            texts = [prompt] if isinstance(prompt, str) else [part["content"] for part in prompt]
            good = texts and all(isinstance(text, str) for text in texts)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UnusableInput(f'{path}, line {number}: want {{"prompt": a text, or a list of '
                                f'{{"role": ..., "content": a text}}}}')
        rows.append({"prompt": prompt})
    return rows


def encode(rows: list[dict], tokenizer, args: RLOOConfig, room: int | None) -> None:
    """Add to each prompt its tokens, as TRL makes them, and its text, for the reward.

    room: the largest number of tokens of prompt and response. Raises UnusableInput.
    """
    prompts = [row["prompt"] for row in rows]
    kinds = {isinstance(prompt, str) for prompt in prompts}
    if len(kinds) > 1:
        raise UnusableInput("--prompts: some are texts and some are messages; want one kind")
    if kinds == {True}:
        ids = tokenizer(text=prompts)["input_ids"]
        texts = prompts
    else:
        if tokenizer.chat_template is None:
            raise UnusableInput("--prompts: messages need a chat template, and this tokenizer has "
                                "none; give texts")
        ids = tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True,
            **(args.chat_template_kwargs or {}))["input_ids"]
        texts = [prompt[-1]["content"] for prompt in prompts]
    for row, text, tokens in zip(rows, texts, ids):
        row["prompt_text"] = text
        row["prompt_ids"] = tokens
        if tokens[-1] == tokenizer.eos_token_id:
            raise UnusableInput(f"the prompt {text[:40]!r} ends with {tokenizer.eos_token}: the "
                                f"model would take it for complete")
        if room is not None and len(tokens) + args.max_completion_length > room:
            raise UnusableInput(f"the prompt {text[:40]!r} has {len(tokens)} tokens: with "
                                f"--max_completion_length {args.max_completion_length} it does not "
                                f"fit into the model's {room}")

# ------------------------------------------------------------------ responses outside of training

class Sampler:
    """Samples, judges and scores responses. Each process does its share."""

    def __init__(self, trainer: RLOOTrainer, tokenizer, file: RewardFile):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.file = file
        self.accelerator = trainer.accelerator

    def wrap(self, model: torch.nn.Module) -> OtherModel:
        """Return a model with the two methods. It ends responses where TRL does."""
        return OtherModel(model, self.trainer.eos_token_ids, self.tokenizer.pad_token_id)

    @contextlib.contextmanager
    def reference(self):
        """Give the base model: the policy without its adapters, or TRL's copy if it has none."""
        if self.trainer.ref_model is not None:
            yield self.wrap(self.trainer.ref_model)
            return
        with self.trainer.model.disable_adapter():
            yield self.wrap(self.trainer.model)

    def draw(self, model: OtherModel, rows: list[dict], count: int, name: str) -> list[dict]:
        """Return `count` responses of the model to each prompt, with texts and rewards."""
        args = self.trainer.args
        index = torch.arange(len(rows)).repeat_interleave(count)
        found = []
        for number, part in self._my_parts(index.tolist()):
            some = [rows[i] for i in part]
            prompt_ids = [row["prompt_ids"] for row in some]
            prompt = pad_left(prompt_ids, self.accelerator.device)
            generator = seeded_generator(self.accelerator.device, name, args.seed, number)
            response, _ = model.sample(prompt, 1, args.max_completion_length, generator)
            response = response[:, 0]
            ids = [y[kept].tolist() for y, kept in zip(response, model.mask(response))]
            texts = response_texts(self.tokenizer, prompt_ids, ids)
            rewards = self.file.ask([row["prompt_text"] for row in some], texts)
            for i, y, text, reward in zip(part, ids, texts, rewards):
                found.append({"part": number, "prompt_id": i, "prompt": rows[i]["prompt_text"],
                              "ids": y, "response": text, "reward": reward})
        return sorted(gather_object(found), key=lambda one: one["part"])

    @torch.no_grad()
    def score(self, model: OtherModel, rows: list[dict], found: list[dict]) -> list[float]:
        """Return the log-probability of each response under the model, in nats."""
        scored = []
        for number, part in self._my_parts(found):
            prompt = pad_left([rows[one["prompt_id"]]["prompt_ids"] for one in part],
                              self.accelerator.device)
            ids = [torch.tensor(one["ids"]) for one in part]
            response = torch.nn.utils.rnn.pad_sequence(ids, True, model.pad).to(prompt.device)
            logprob = model.logprob(prompt, response[:, None])
            scored.append((number, logprob[:, 0].tolist()))
        scored = sorted(gather_object(scored))
        return [x for _, part in scored for x in part]

    def _my_parts(self, items: list) -> list[tuple[int, list]]:
        """Return the numbered parts that this process has to do."""
        size = self.trainer.args.per_device_eval_batch_size
        parts = [items[start:start + size] for start in range(0, len(items), size)]
        return list(enumerate(parts))[self.accelerator.process_index::self.accelerator.num_processes]

    def check(self, rows: list[dict]) -> None:
        """Raise UnusableInput unless `generate`, scoring with padding and without agree.

        This finds most models that are not causal, or that see what stands before a prompt.
        """
        prompts = sorted((row["prompt_ids"] for row in rows), key=len)
        prompts = [prompts[0], prompts[-1]]
        model = self.wrap(self.trainer.model)
        prompt = pad_left(prompts, self.accelerator.device)
        with torch.no_grad():
            made = model.model.generate(
                prompt.clamp(min=0), attention_mask=(prompt != NO_TOKEN).long(), do_sample=True,
                max_new_tokens=8, min_new_tokens=8, output_logits=True,
                return_dict_in_generate=True)
            response = made.sequences[:, prompt.shape[1]:]
            logits = torch.stack(made.logits, 1).float()
            kept = model.mask(response)
            recorded = logits.log_softmax(-1).gather(2, response[:, :, None])[:, :, 0]
            recorded = (recorded.double() * kept).sum(-1)
            padded = model.logprob(prompt, response[:, None])[:, 0]
            alone = [model.logprob(pad_left([x], prompt.device), y[None, None])[0, 0]
                     for x, y in zip(prompts, response)]
        found = torch.stack([recorded, padded, torch.stack(alone)])             # (3, 2)
        largest = (found.max(0).values - found.min(0).values).max().item()
        exact = self.trainer.model.dtype == torch.float32 and not self.trainer.args.bf16
        if not largest < (0.05 if exact else 1):
            raise UnusableInput(f"this model gives the same 8 tokens log-probabilities that differ "
                                f"by {largest:.3g} nats, when it samples or scores them, with or "
                                f"without padding: want a causal model")


def add_positions(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Number the tokens of a padded batch from the first token of each prompt.

    TRL scores with a mask alone. A model with absolute positions, such as GPT-2, would count the
    padding; `generate` does not.
    """
    mask = kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids")
    if kwargs.get("position_ids") is None and mask is not None and tokens is not None:
        if mask.shape == tokens.shape:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, kwargs

# ----------------------------------------------------------------------------------------- the run

def main(argv: list[str] | None = None) -> list[dict] | None:
    """Train with TRL, evaluate, and leave the policy. Returns the rows of the table."""
    own, args, model_args = parse(argv)
    out = Path(args.output_dir)
    # whatever can be wrong is looked at before the model is loaded
    file = RewardFile(own.reward)
    rows = read_prompts(own.prompts)
    held_out = read_prompts(own.held_out) if own.held_out else rows[::5]
    if not own.held_out:
        rows = [row for i, row in enumerate(rows) if i % 5 != 0]
    check_sizes(own, args, rows, held_out)
    tokenizer, room = read_tokenizer(model_args, args)
    encode(rows, tokenizer, args, room)
    encode(held_out, tokenizer, args, room)
    some = [row["prompt_text"] for row in held_out[:8]]
    file.ask(some, some[::-1])
    try:
        check_writable(out)
    except OSError as error:
        raise UnusableInput(f"--output_dir {out}: {error.strerror}") from None

    trainer = make_trainer(own, args, model_args, tokenizer, file)
    sampler = Sampler(trainer, tokenizer, file)
    sampler.check(rows + held_out)
    say = trainer.accelerator.print

    # ---- reference responses: F is estimated from their rewards
    depends = (model_files(model_args), Path(own.reward).read_text(encoding="utf-8"), args.seed,
               args.max_completion_length, args.per_device_eval_batch_size)
    with sampler.reference() as reference:
        drawn = keep(out, (own.m, rows, *depends), sampler.draw, reference, rows, own.m, "training")
        held = keep(out, (own.m_eval, held_out, *depends), sampler.draw, reference, held_out,
                    own.m_eval, "held-out")
    for i, row in enumerate(rows):
        row["ref_rewards"] = [one["reward"] for one in drawn[i * own.m:(i + 1) * own.m]]
    trainer.train_dataset = Dataset.from_list(rows)
    for note in notes(own, rows, held_out, drawn):
        say(note)

    # ---- fine-tuning
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        checkpoint = get_last_checkpoint(args.output_dir)       # none yet: from the beginning
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # ---- evaluation
    table, records = evaluate(sampler, own, held_out, held)
    if trainer.accelerator.is_main_process:
        for name, some in records.items():
            write_lines(out / f"responses-{name}.jsonl", some)
        ref_rewards = as_matrix(held, "reward", len(held_out))[:, :own.m_eval // 2]
        report.print_table(table, ref_rewards, args.max_completion_length)
        save_policy(trainer, tokenizer, out, own.merge)
    trainer.accelerator.wait_for_everyone()
    return table


def check_sizes(own: Arguments, args: RLOOConfig, rows: list, held_out: list) -> None:
    """Raise UnusableInput for too few prompts."""
    if len(held_out) < 8:
        raise UnusableInput(f"{len(held_out)} held-out prompts: want at least 8; give more "
                            f"--prompts, or a file --held_out")
    in_update = args.generation_batch_size // args.num_generations
    if len(rows) < in_update:
        raise UnusableInput(f"{len(rows)} training prompts, but an update takes {in_update}: lower "
                            f"--gradient_accumulation_steps or --per_device_train_batch_size")


def read_tokenizer(model_args: ModelConfig, args: RLOOConfig):
    """Return the model's tokenizer, and how many tokens the model has room for (None: any)."""
    name = model_args.model_name_or_path
    if name is None:
        raise UnusableInput("--model_name_or_path: want a Hugging Face folder or name")
    if Path(name, "adapter_config.json").exists():
        raise UnusableInput(f"--model_name_or_path {name}: an adapter; merge it into its model "
                            f"first (merge_and_unload of peft)")
    settings = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left",
                                                               **settings)
    except (OSError, ValueError) as error:
        raise UnusableInput(f"--model_name_or_path {name}: {' '.join(str(error).split())[:200]}"
                            ) from None
    kinds = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = type(config) in kinds.keys() or hasattr(config, "auto_map")
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise UnusableInput(f"--model_name_or_path {name}: a {config.model_type} is no causal "
                            f"language model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token       # as TRL does
    if tokenizer.pad_token is None:
        raise UnusableInput(f"--model_name_or_path {name}: its tokenizer has no end-of-text token")
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def make_trainer(own: Arguments, args: RLOOConfig, model_args: ModelConfig, tokenizer,
                 file: RewardFile) -> RLOOTrainer:
    """Return TRL's trainer with the model; the dataset comes later."""
    args.model_init_kwargs = {
        "revision": model_args.model_revision, "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation} | (args.model_init_kwargs or {})
    trainer = RLOOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=functools.partial(vbon_reward, file, tokenizer, own.n), args=args,
        train_dataset=Dataset.from_list([{"prompt": ""}]), processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    if not all(p.dtype == torch.float32 for p in trained):
        raise UnusableInput("in half precision most updates are lost: want --dtype float32")
    if args.learning_rate is None:
        # the noise of all parameters together should not grow with their number: see README.md
        args.learning_rate = 0.54 / math.sqrt(sum(p.numel() for p in trained))
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            inner = OtherModel(model, None, 0)
            if "position_ids" in inner.takes:
                inner.model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)
            # a saved model samples from its own distribution
            inner.model.generation_config = transformers.GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=args.max_completion_length, eos_token_id=trainer.eos_token_ids,
                bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    return trainer


def model_files(model_args: ModelConfig) -> list:
    """Return what tells one model from another: name, revision, and files of a folder."""
    folder = Path(model_args.model_name_or_path)
    files = []
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return [model_args.model_name_or_path, model_args.model_revision, model_args.dtype, files]


def keep(out: Path, depends: tuple, function, *args) -> list[dict]:
    """Return function(*args), from a file in `out` if an earlier run has left it there."""
    name = hashlib.sha256(repr(depends).encode("utf-8")).hexdigest()[:12]
    path = out / f"ref-{name}.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = function(*args)
    write_lines(path, found)
    return found


def notes(own: Arguments, rows: list[dict], held_out: list[dict], drawn: list[dict]) -> list[str]:
    """Return the lines that are printed before the training."""
    lines = [f"{len(rows)} prompts to train on, {len(held_out)} held-out prompts",
             f"the first prompt: {rows[0]['prompt_text']!r}",
             f"a response of the base model: {drawn[0]['response']!r}, "
             f"reward {drawn[0]['reward']:.3g}"]
    best = own.n / (own.n + 1)
    wins = wins_of_target(own.n, own.m)
    if wins < best - 0.01:
        lines.append(f"M = {own.m} is small for n = {own.n}: even a perfect policy would win only "
                     f"{wins:.3f} ({best:.3f} by best of {own.n}); raise --m")
    for marker in ("<|im_start|>", "[INST]", "<|start_header_id|>"):
        if isinstance(rows[0]["prompt"], str) and marker in rows[0]["prompt"]:
            lines.append(f"the prompts hold the chat marker {marker}: messages in a .jsonl file "
                         f"would be safer")
    return lines

# -------------------------------------------------------------------------------------- evaluation

def as_matrix(found: list[dict], name: str, prompts: int) -> Tensor:
    """Return one number of each response (P, K)."""
    return torch.tensor([one[name] for one in found], dtype=torch.float64).view(prompts, -1)


def evaluate(sampler: Sampler, own: Arguments, rows: list[dict], held: list[dict]
             ) -> tuple[list[dict], dict]:
    """Return the rows of reference, best-of-N and vBoN as in train.py, and all responses."""
    policy = sampler.wrap(sampler.trainer.model)
    found = sampler.draw(policy, rows, own.k_eval, "policy")
    logprob = sampler.score(policy, rows, found)
    with sampler.reference() as reference:
        ref_logprob = sampler.score(reference, rows, found)
        held_logprob = sampler.score(reference, rows, held)
    add_logprobs(held, held_logprob, held_logprob)
    add_logprobs(found, logprob, ref_logprob)

    # the first half estimates F; best-of-N chooses among the others, the candidates
    P = len(rows)
    half = own.m_eval // 2
    ref_rewards = as_matrix(held, "reward", P)[:, :half]
    rewards = as_matrix(held, "reward", P)[:, half:]
    candidates = as_matrix(held, "logprob", P)[:, half:]
    groups = rewards.shape[1] // own.n
    best = vbon.best_of_n(rewards[:, :groups * own.n].reshape(P * groups, own.n),
                          seeded_generator("cpu", "best", own.n, sampler.trainer.args.seed))
    best = best.view(P, groups) + own.n * torch.arange(groups)
    log_bon = vbon.bon_target(candidates.gather(1, best), rewards.gather(1, best), ref_rewards,
                              own.n)
    table = []
    for method, samples, numbers in (
            ("ref", 1, (candidates, candidates, rewards)),
            ("bon", own.n, (log_bon, candidates.gather(1, best), rewards.gather(1, best))),
            ("vbon", 1, [as_matrix(found, name, P) for name in ("logprob", "ref_logprob",
                                                                "reward")])):
        row = train.metrics(*numbers, ref_rewards, own.n)
        table.append({"method": method, "n": own.n, "samples_per_answer": samples} | row)
    longest = sampler.trainer.args.max_completion_length
    ends = sampler.trainer.eos_token_ids
    for row, some in zip(table, (held, held, found)):
        cut = [len(one["ids"]) == longest and one["ids"][-1] not in ends for one in some]
        row["cut"] = sum(cut) / len(cut)
    return table, {"reference": with_method(held, "ref"), "policy": with_method(found, "vbon")}


def add_logprobs(found: list[dict], logprob: list[float], ref_logprob: list[float]) -> None:
    """Add the log-probabilities of the responses, under what sampled them and the base model."""
    for one, x, ref in zip(found, logprob, ref_logprob):
        one |= {"logprob": x, "ref_logprob": ref, "token_kl": x - ref}


def with_method(found: list[dict], method: str) -> list[dict]:
    """Return the responses with the name of what sampled them first, as train.py's files."""
    return [{"method": method} | one for one in found]


def save_policy(trainer: RLOOTrainer, tokenizer, out: Path, merge: bool) -> None:
    """Leave the policy as one complete model, if it is asked for."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if merge and hasattr(model, "merge_and_unload"):
        merged = model.merge_and_unload()
        merged.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    print(f"{out} holds the policy and all responses")


if __name__ == "__main__":
    options.run(main, "with_trl")
