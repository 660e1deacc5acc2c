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

from experiments import with_trl  # noqa: E402
from experiments.test_other_model import all_responses  # noqa: E402
from support.files import UnusableInput  # noqa: E402
from support.own_reward import RewardFile  # noqa: E402

ROOT = Path(__file__).parent.parent
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'][0] + m['content'] + '.' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '!' }}{% endif %}")
MANY_A = "def reward(prompts, responses):\n    return [r.count('a') for r in responses]\n"


def make_folder(folder, kind="llama", letters="abcdesu .!", template=None):
    """A small model; its tokens are letters, <pad> and <end>."""
    names = [*letters, "<pad>", "<end>"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {name: i for i, name in enumerate(names)}, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>", pad_token="<pad>",
        chat_template=template).save_pretrained(folder)
    torch.manual_seed(0)
    ids = dict(vocab_size=len(names), initializer_range=0.4, bos_token_id=len(names) - 1,
               eos_token_id=len(names) - 1, pad_token_id=len(names) - 2)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=64, n_embd=16, n_layer=1, n_head=2, **ids))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, **ids))
    model.save_pretrained(folder)


def flags(folder, **others):
    """The command line of a small run."""
    given = dict(model_name_or_path=folder / "model", prompts=folder / "prompts.txt",
                 reward=folder / "reward.py", output_dir=folder / "out", use_cpu=True, max_steps=4,
                 max_completion_length=4, m=16, m_eval=32, n=2, gradient_accumulation_steps=2,
                 per_device_train_batch_size=32, disable_tqdm=True, save_steps=2) | others
    words = [(f"--{name}", str(value)) for name, value in given.items()]
    return [word for pair in words for word in pair]


@pytest.fixture
def folder(tmp_path):
    """A model, 50 prompts, and a reward."""
    make_folder(tmp_path / "model", template=TEMPLATE)
    prompts = ["ab"[i % 2] * (i % 5 + 1) + " " + "cde"[i % 3] for i in range(50)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts), encoding="utf-8")
    lines = [json.dumps({"prompt": [{"role": "system", "content": "d"},
                                    {"role": "user", "content": text}]}) for text in prompts]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "reward.py").write_text(MANY_A, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("reward", ["2 * r.count('a') + r.startswith('b') + len(r) / 8",
                                    "float('a' in r)"])
def test_the_gradient_of_trl_is_that_of_equation_6(kind, reward, tmp_path):
    """Of a policy far from the reference, for prompts of two lengths, with and without ties."""
    make_folder(tmp_path / "model", kind, "ab")
    (tmp_path / "reward.py").write_text(f"def reward(prompts, responses):\n"
                                        f"    return [{reward} for r in responses]\n")
    own, args, model_args = with_trl.parse(flags(
        tmp_path, n=3, max_steps=1, max_completion_length=2, num_generations=2048,
        per_device_train_batch_size=2048, optim="sgd", learning_rate=1,
        lr_scheduler_type="constant", save_strategy="no"))
    tokenizer, room = with_trl.read_tokenizer(model_args, args)
    rows = [{"prompt": "ab"}, {"prompt": "babba"}]
    with_trl.encode(rows, tokenizer, args, room)
    file = RewardFile(tmp_path / "reward.py")
    y = all_responses((3,), 2)[0][:, :2].unique(dim=0)
    moved = []
    for args.seed in (0, 1):
        trainer = with_trl.make_trainer(args, model_args, tokenizer, functools.partial(
            with_trl.vbon_reward, file, tokenizer, own.n))
        policy = with_trl.wrap(trainer, trainer.model)
        generator = torch.Generator().manual_seed(0)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        for p in trained:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        objective = 0
        for row in rows:
            texts = with_trl.response_texts(tokenizer, [row["prompt_ids"]] * len(y), y.tolist())
            rewards = torch.tensor(file.ask([row["prompt_text"]] * len(y), texts)).double()[None]
            prompt = torch.tensor([row["prompt_ids"]])
            with with_trl.model_of(trainer, "reference") as model:
                ref_logprob = model.logprob(prompt, y[None]).detach()
            drawn = torch.multinomial(ref_logprob[0].exp(), 60, True, generator=generator)
            row["ref_rewards"] = rewards[0, drawn].tolist()
            logprob = policy.logprob(prompt, y[None])
            weight = with_trl.log_weight(rewards, rewards[:, drawn], own.n)
            score = (ref_logprob + weight - logprob).detach()
            objective = objective + (logprob.detach().exp() * score * logprob).sum() / len(rows)
        exact = torch.autograd.grad(objective, trained)
        before = [p.detach().clone() for p in trained]
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()                                 # moves by 1 times the gradient
        moved.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(trained, before)]))
    exact = torch.cat([g.flatten() for g in exact])
    # two samples tell the error of one
    error = (moved[0] - moved[1]).norm() / 2 ** 0.5
    assert error < 0.1 * exact.norm()
    assert all((one - exact).norm() < 2 * error for one in moved)


def test_log_weights_are_those_of_equations_3_and_4():
    reward = torch.tensor([[2.0, 2.5]], dtype=torch.float64)
    ref_rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]], dtype=torch.float64)
    found = with_trl.log_weight(reward, ref_rewards, 2).exp()
    # reward 2: F_le + F_lt = 4/5 + 2/5; reward 2.5 does not tie: 2 F
    assert found[0].tolist() == pytest.approx([6 / 5, 8 / 5], rel=1e-9)


def test_a_run_makes_the_policy_better_and_leaves_it_as_a_folder(folder):
    reference, best, policy = with_trl.main(flags(folder, max_steps=60, n=3, m_eval=128,
                                                  per_device_train_batch_size=64))
    assert abs(reference["win_rate"] - 0.5) < 4 * reference["win_rate_se"]
    assert abs(best["win_rate"] - best["theory_win_rate"]) < 4 * best["win_rate_se"]
    assert policy["win_rate"] > 0.5 + 0.6 * (best["win_rate"] - 0.5)
    assert policy["kl_bon"] < 0.5 * reference["kl_bon"]
    assert policy["kl_ref"] < best["kl_ref"] + 0.15
    # transformers alone samples the same rewards, and its log-probabilities are those of the file
    lines = (folder / "out/responses-policy.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    assert sum(one["reward"] for one in lines) / len(lines) == pytest.approx(policy["reward"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out/merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out/merged")
    rewards = []
    for text in {one["prompt"] for one in lines}:
        batch = tokenizer([text] * 200, return_tensors="pt")
        made = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
        made = made[:, batch["input_ids"].shape[1]:]
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        rewards += [one.count("a") for one in texts]
    error = torch.tensor(rewards).double().std() / len(rewards) ** 0.5
    assert abs(sum(rewards) / len(rewards) - policy["reward"]) < 6 * error
    cut = next(one for one in lines if one["cut"])
    ids = torch.tensor([tokenizer(cut["prompt"] + cut["response"])["input_ids"]])
    logprob = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    assert logprob[-4:].sum().item() == pytest.approx(cut["logprob"], abs=1e-3)


def test_a_resumed_run_ends_with_the_policy_of_an_uninterrupted_one(folder):
    first = with_trl.main(flags(folder))
    shutil.copytree(folder / "out/checkpoint-2", folder / "again/checkpoint-2")
    second = with_trl.main(flags(folder, output_dir=folder / "again",
                                 resume_from_checkpoint=True))
    assert first == second


def test_messages_get_the_template_once_and_the_reward_sees_the_last_one(folder, capfd):
    (folder / "reward.py").write_text(
        "def reward(prompts, responses):\n"
        "    assert all(len(p) <= 7 and p[-2] == ' ' for p in prompts), prompts\n"
        "    return [r.count('a') for r in responses]\n", encoding="utf-8")
    own, args, model_args = with_trl.parse(flags(folder, prompts=folder / "chat.jsonl"))
    tokenizer, room = with_trl.read_tokenizer(model_args, args)
    rows = with_trl.read_prompts(own.prompts)
    with_trl.encode(rows, tokenizer, args, room)
    assert tokenizer.decode(rows[1]["prompt_ids"]) == "<end>sd.ubb d.!"
    with_trl.main(flags(folder, prompts=folder / "chat.jsonl", max_steps=1))
    assert "the first prompt: 'bb d'" in capfd.readouterr().out


def test_a_response_keeps_its_first_blank():
    """A Llama's decoder removes the first blank of whatever it decodes."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "b": 2}))
    inner.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.decode([1]) == "b"
    assert with_trl.response_texts(tokenizer, [[0], [0]], [[1], [2]]) == [" b", "b"]


@pytest.mark.parametrize("changes, message", [
    ({"beta": 0.1}, "--beta 0.1: another objective than vBoN's; want 1.0"),
    ({"num_iterations": 2}, "--num_iterations 2"), ({"temperature": 0.7}, "--temperature 0.7"),
    ({"normalize_advantages": True}, "--normalize_advantages"),
    ({"steps_per_generation": 4}, "--steps_per_generation"), ({"m_eval": 3}, "--m_eval 3"),
    ({"num_generations": 1}, "generations"), ({"betta": 1}, "--betta"),
    ({"use_peft": False, "dtype": "bfloat16"}, "half precision"),
    ({"model_name_or_path": "nowhere"}, "--model_name_or_path nowhere"),
    ({"prompts": "nowhere.txt"}, "nowhere.txt"), ({"reward": "nowhere.py"}, "nowhere.py"),
    ({"output_dir": __file__}, "--output_dir"), ({"max_completion_length": 60}, "room for 64"),
    ({"gradient_accumulation_steps": 32}, "40 training prompts, but 128 in an update")])
def test_unusable_arguments_are_refused_in_one_line(changes, message, folder):
    with pytest.raises(UnusableInput) as error:
        with_trl.main(flags(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("reward.py", "def reward(p, r): return [float('nan')] * len(r)", "nan"),
    ("prompts.txt", "a\nb", "1 held-out prompts: want at least 8"),
    ("prompts.txt", "a<end>\n" * 50, "ends with the end-of-text"),
    ("chat.jsonl", '{"prompt": []}\n' * 50, "want objects with"),
    ("chat.jsonl", '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "a"}]}\n' * 25,
     "want texts or messages, not both"),
    ("model/chat_template.jinja", None, "messages need a model with a chat template"),
    ("model/adapter_config.json", "{}", "is an adapter"),
    ("model/config.json", '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
     "BertForMaskedLM is no causal language model")])
def test_unusable_files_are_refused_in_one_line(name, content, message, folder):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    prompts = folder / ("chat.jsonl" if "chat" in name else "prompts.txt")
    with pytest.raises(UnusableInput, match=message):
        with_trl.main(flags(folder, prompts=prompts))


def test_a_model_that_is_not_causal_is_found(folder):
    model = transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, eos_token_id=11, pad_token_id=10, initializer_range=0.4))
    model.save_pretrained(folder / "model")
    with pytest.raises(UnusableInput, match="want a causal language model"):
        with_trl.main(flags(folder))


def test_two_processes_end_with_the_same_table_and_a_fault_in_the_reward_with_one_line(folder):
    (folder / "config.yaml").write_text("n: 2\nm: 16\n", encoding="utf-8")
    words = flags(folder, max_steps=30, n=2, m=16, gradient_accumulation_steps=1, m_eval=128)
    for name in ("--n", "--m"):                         # torchrun would take them for its own
        del words[words.index(name):words.index(name) + 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
               "experiments.with_trl", "--config", str(folder / "config.yaml"), *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("theory, n = 2") == 1
    alone = with_trl.main(flags(folder, max_steps=30, m_eval=128, output_dir=folder / "alone"))
    cells = next(line for line in run.stdout.splitlines() if line.startswith("vBoN  ")).split()
    assert float(cells[2]) == pytest.approx(alone[2]["win_rate"], abs=0.06)
    (folder / "reward.py").write_text(MANY_A.replace("r.count", "len(r) < 4 or 1 / 0 or r.count"),
                                      encoding="utf-8")
    run = subprocess.run([sys.executable, "-m", "experiments.with_trl", *flags(folder)], cwd=ROOT,
                         capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 2 and "ZeroDivisionError: division by zero" in last
