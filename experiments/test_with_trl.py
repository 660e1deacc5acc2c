"""vBoN through TRL: its gradient is that of (6), and a run leaves a policy that can be used."""
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs the library TRL")
os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.nn.utils import parameters_to_vector  # noqa: E402
from trl import RLOOTrainer, get_peft_config  # noqa: E402

from experiments import with_trl  # noqa: E402
from experiments.other_model import OtherModel  # noqa: E402
from support.files import UnusableInput  # noqa: E402
from support.own_reward import RewardFile  # noqa: E402
from support.statistics import bon_attains  # noqa: E402

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] + m['content'] + '.' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '!' }}{% endif %}")
REWARD = "def reward(prompts, responses):\n    return [{} for r in responses]\n"
IDS = dict(vocab_size=12, bos_token_id=11, eos_token_id=11, pad_token_id=10, initializer_range=0.4)
LLAMA = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=64, **IDS)
GPT2 = transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2, **IDS)
BERT = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=16, **IDS)


def save_model(folder, config):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A small model whose tokens are letters, 50 prompts, and a reward."""
    names = [*"abcdesu .!", "#", "<end>"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(names, range(12))), "#"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>", pad_token="#",
        chat_template=TEMPLATE).save_pretrained(tmp_path / "model")
    save_model(tmp_path / "model", LLAMA)
    prompts = ["ab"[i % 2] * (i % 5 + 1) + " " + "cde"[i % 3] for i in range(50)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    lines = [json.dumps({"prompt": [{"role": "system", "content": "d"},
                                    {"role": "user", "content": text}]}) for text in prompts]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "reward.py").write_text(REWARD.format("r.count('a')"), encoding="utf-8")
    return tmp_path


def flags(folder, **others):
    """The command line of a small run."""
    given = dict(model_name_or_path=folder / "model", prompts=folder / "prompts.txt",
                 reward=folder / "reward.py", output_dir=folder / "out", use_cpu=True, max_steps=4,
                 max_completion_length=4, m=16, m_eval=60, n=2, gradient_accumulation_steps=2,
                 per_device_train_batch_size=32, disable_tqdm=True, save_steps=2) | others
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def read(folder, name):
    text = next(folder.rglob(f"responses-{name}.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("config, reward", [
    (LLAMA, "float('a' in r)"), (GPT2, "sum(ord(c) * 7 ** i for i, c in enumerate(r)) % 101")])
def test_the_gradient_of_trl_is_that_of_equation_6(config, reward, folder):
    """Of a policy far from the reference, for prompts of two lengths, with and without ties."""
    save_model(folder / "model", config)
    (folder / "reward.py").write_text(REWARD.format(reward), encoding="utf-8")
    (folder / "prompts.txt").write_text("ab\nbabba", encoding="utf-8")
    own, args, model_args = with_trl.parse(flags(
        folder, n=3, max_steps=1, max_completion_length=2, num_generations=4096,
        per_device_train_batch_size=4096, optim="sgd", learning_rate=1, max_grad_norm=0,
        save_strategy="no", lr_scheduler_type="constant"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = with_trl.read_prompts(own.prompts, tokenizer, args)
    file = RewardFile(own.reward)
    trainer = RLOOTrainer(
        model=model, reward_funcs=functools.partial(with_trl.vbon_reward, file, tokenizer, [11], 3),
        args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=get_peft_config(model_args))
    policy = OtherModel(trainer.model, trainer.eos_token_ids, tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for p in trained:
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    # all responses, their rewards, and the weights of (4) by the estimate (7)
    y = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    y = torch.where(y[:, :1] == 11, torch.tensor([11, 10]), y).unique(dim=0)
    texts = [text.partition("<end>")[0] for text in tokenizer.batch_decode(y)]
    r = torch.tensor(file.ask([""] * len(y), texts))
    objective = 0
    for row in rows:
        prompt = torch.tensor([row["prompt_ids"]])
        with trainer.model.disable_adapter():
            ref_logprob = policy.logprob(prompt, y[None]).detach()
        drawn = r[torch.multinomial(ref_logprob[0].exp(), 10, True, generator=generator)]
        row["ref_rewards"] = drawn.tolist()
        lower = ((drawn < r[:, None]).sum(1) + 1) / 11
        upper = lower + (drawn == r[:, None]).sum(1) / 11
        weight = (upper ** 2 + upper * lower + lower ** 2).log()
        logprob = policy.logprob(prompt, y[None])
        score = (ref_logprob + weight - logprob).detach()
        objective = objective + (logprob.detach().exp() * score * logprob).sum() / len(rows)
    exact = parameters_to_vector(torch.autograd.grad(objective, trained))
    before = parameters_to_vector(trained).detach().clone()
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.train()                                     # moves by 1 times the gradient
    moved = parameters_to_vector(trained).detach() - before
    assert (moved - exact).norm() < 0.1 * exact.norm()


def test_a_run_makes_the_policy_better_and_leaves_it_as_a_folder(folder):
    reference, best, policy = with_trl.main(flags(folder, max_steps=200, n=3))
    ref_rewards = torch.tensor([one["reward"] for one in read(folder / "out", "held-out")])
    _, theory = bon_attains(ref_rewards.view(10, -1), 3)
    assert abs(best["win_rate"] - theory) < 4 * best["win_rate_se"]
    assert policy["win_rate"] > 0.5 + 0.6 * (best["win_rate"] - 0.5)
    assert policy["kl_bon"] < 0.5 * reference["kl_bon"]
    # the folder is for serving: no batch is padded to a length of training
    assert json.loads((folder / "out/merged/tokenizer.json").read_text())["padding"] is None
    # transformers alone samples the same rewards
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out/merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out/merged")
    prompts = [one["prompt"] for one in read(folder / "out", "policy")]
    made = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
    texts = tokenizer.batch_decode(made[:, -4:], skip_special_tokens=True)
    rewards = torch.tensor([text.count("a") for text in texts]).double()
    assert abs(rewards.mean() - policy["reward"]) < 6 * rewards.std() / len(rewards) ** 0.5


def test_a_resumed_run_ends_with_the_policy_of_an_uninterrupted_one(folder):
    first = with_trl.main(flags(folder))
    shutil.copytree(folder / "out/checkpoint-2", folder / "middle")
    (folder / "out/responses-policy.jsonl").write_text("an earlier policy", encoding="utf-8")
    assert with_trl.main(flags(folder, resume_from_checkpoint=folder / "middle")) == first


def test_messages_get_the_template_once_and_the_reward_sees_the_last_one(folder):
    own, args, _ = with_trl.parse(flags(folder, prompts=folder / "chat.jsonl"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    rows = with_trl.read_prompts(own.prompts, tokenizer, args)
    assert tokenizer.decode(rows[1]["prompt_ids"]) == "<end>sd.ubb d.!"
    with_trl.main(flags(folder, prompts=folder / "chat.jsonl", max_steps=1))
    assert read(folder / "out", "training")[0]["prompt"] == "bb d"


def test_a_response_keeps_its_blanks():
    """A Llama's decoder removes the first one, and some tokenizers those before a full stop."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "b": 2, "▁.": 3}))
    inner.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner,
                                                     clean_up_tokenization_spaces=True)
    assert tokenizer.decode([1, 3]) == "b."
    assert with_trl.response_texts(tokenizer, [], [[0], [0]], [[1, 3], [2]]) == [" b .", "b"]


def test_a_reward_sees_the_markers_in_a_response_but_not_its_end(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.eos_token_id = [9]          # "!"; the tokenizer has another end
    ends = with_trl.end_tokens(model, tokenizer)
    texts = with_trl.response_texts(tokenizer, ends, [[0]] * 3, [[10, 1, 9], [0, 11], [9, 2]])
    assert texts == ["#b", "a", "!c"]


def change_json(path, **changes):
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


@pytest.mark.parametrize("before, after, prompt, message", [
    ([], ["end"], "ab", "the tokenizer ends each text"),
    (["end"], [], "<end>ab", "the tokenizer begins texts itself")])
def test_a_tokenizer_that_adds_tokens_to_prompts(before, after, prompt, message, folder):
    mark = {"SpecialToken": {"id": "<end>", "type_id": 0}}
    parts = [mark for _ in before] + [{"Sequence": {"id": "A", "type_id": 0}}]
    parts += [mark for _ in after]
    change_json(folder / "model/tokenizer.json", post_processor={
        "type": "TemplateProcessing", "single": parts, "pair": parts,
        "special_tokens": {"<end>": {"id": "<end>", "ids": [11], "tokens": ["<end>"]}}})
    (folder / "prompts.txt").write_text("\n".join([prompt] * 50), encoding="utf-8")
    refuse(message, folder)


def test_chat_markers_in_a_text_get_a_note(folder, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    _, args, _ = with_trl.parse(flags(folder))
    (folder / "prompts.txt").write_text("ab\n[INST] b [/INST]", encoding="utf-8")
    with_trl.read_prompts(str(folder / "prompts.txt"), tokenizer, args)
    assert "[INST] in a text: give a chat as messages" in capsys.readouterr().out


def test_incomplete_models_are_refused(folder):
    change_json(folder / "model/tokenizer_config.json", pad_token="[PAD]")
    refuse("the token [PAD] that pads is not among the 12 of the model", folder)
    words = {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"}
    change_json(folder / "model/tokenizer.json", model=words)
    refuse("WordLevel error", folder)
    (folder / "model/adapter_config.json").write_text("{}", encoding="utf-8")
    refuse("an adapter; want a complete model", folder)


def refuse(message, folder, **changes):
    with pytest.raises(UnusableInput) as error:
        with_trl.main(flags(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes, message", [
    ({"beta": 0.1}, "--beta 0.1: vBoN's objective wants 1.0"), ({"temperature": 0.7}, "--temp"),
    ({"use_peft": False}, "--use_peft"), ({"steps_per_generation": 4}, "--steps_per_generation"),
    ({"m_eval": 31}, "--m_eval 31"), ({"num_generations": 1}, "generations"),
    ({"betta": 1}, "--betta"), ({"n": "x"}, "--n"), ({"model_name_or_path": "nowhere"}, "nowhere"),
    ({"prompts": "nowhere.txt"}, "nowhere.txt"), ({"reward": "nowhere.py"}, "nowhere.py"),
    ({"output_dir": __file__}, "Not a directory"), ({"output_dir": ""}, "--output_dir is empty"),
    ({"max_completion_length": 60}, "room for 64"), ({"use_vllm": True}, "vLLM"),
    ({"gradient_accumulation_steps": 32}, "want 128 prompts, those of an update")])
def test_unusable_arguments_are_refused_in_one_line(changes, message, folder):
    refuse(message, folder, **changes)


@pytest.mark.parametrize("name, content, message", [
    ("reward.py", REWARD.format("float('nan')"), "nan"),
    ("prompts.txt", "a\nb", "8 held-out ones; got 1 and 1"),
    ("chat.jsonl", '{"prompt": []}', "a list of messages"),
    ("chat.jsonl", '{"prompt": ""}', "without a token"),
    ("chat.jsonl", '{"prompt": "a"}\n{"prompt": [{"role": "u", "content": "a"}]}\n' * 25, "mix"),
    ("model/chat_template.jinja", None, "chat_template is not set"),
    ("model/chat_template.jinja", "{{ 1 / m }}", "'m' is undefined")])
def test_unusable_files_are_refused_in_one_line(name, content, message, folder):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    refuse(message, folder, prompts=folder / ("chat.jsonl" if "chat" in name else "prompts.txt"))


@pytest.mark.parametrize("model, message", [
    (transformers.BertForMaskedLM(BERT), "want a causal language model"),
    (transformers.T5Model(transformers.T5Config(d_model=8, num_layers=1)), "AutoModelForCausalLM")])
def test_a_model_that_is_not_causal_is_refused(model, message, folder):
    model.save_pretrained(folder / "model")
    refuse(message, folder)


def test_two_processes_end_with_the_same_table(folder):
    # torchrun would take --n and --m for its own
    words = dict(n=None, m=None, max_steps=30)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
               "experiments.with_trl", *flags(folder, gradient_accumulation_steps=1, **words)]
    out = subprocess.check_output(command, cwd=Path(__file__).parent.parent, text=True)
    assert out.count("theory, n = 4") == 1
    alone = with_trl.main(flags(folder, output_dir=folder / "alone", **words))
    cells = next(line for line in out.splitlines() if line.startswith("vBoN  ")).split()
    assert float(cells[2]) == pytest.approx(alone[2]["win_rate"], abs=0.06)
