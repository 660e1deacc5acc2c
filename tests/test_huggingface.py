"""Hugging Face folders: models read, written and refused; downloads."""
import functools
import http.server
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import small_gpt
from test_tokenizer import write_vocabulary

from model import GPT
from support import huggingface
from support.files import UnusableInput
from support.huggingface import download, load_model, read_config, save_model
from support.inputs import load_pretrained

# -------------------------------------------------------------------------------- GPT-2's own files

CONFIG = dict(vocab_size=50, n_positions=12, n_embd=16, n_layer=3, n_head=4,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def gpt2_weights():
    """Random tensors under the names and shapes of a GPT-2 checkpoint."""
    g = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (50, 16), "wpe.weight": (12, 16),
              "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for i in range(3):
        parts = {"ln_1": (16,), "attn.c_attn": (16, 48), "attn.c_proj": (16, 16),
                 "ln_2": (16,), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
        for name, shape in parts.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def numpy_gpt2(weights, head):
    """GPT-2's logits (T, V) of TOKENS, written a second time, in float64."""
    w = {name: x.double().numpy() for name, x in weights.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    T = len(TOKENS)
    x = w["wte.weight"][TOKENS] + w["wpe.weight"][:T]
    for h in ("h.0.", "h.1.", "h.2."):
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn")
        heads = []
        for i in range(4):
            q = qkv[:, 4 * i:4 * i + 4]
            k = qkv[:, 16 + 4 * i:16 + 4 * i + 4]
            v = qkv[:, 32 + 4 * i:32 + 4 * i + 4]
            score = np.where(np.tri(T, dtype=bool), q @ k.T / 2, -np.inf)
            prob = np.exp(score - score.max(-1, keepdims=True))
            heads.append(prob / prob.sum(-1, keepdims=True) @ v)
        x = x + linear(np.concatenate(heads, -1), h + "attn.c_proj")
        u = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, h + "mlp.c_proj")
    return norm(x, "ln_f") @ head.double().numpy().T


def write_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")


def write_safetensors(path, weights, dtype="F32"):
    """The format of safetensors, written a second time."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in weights.items():
        part = x.contiguous().numpy().tobytes()
        header[name] = dict(dtype=dtype, shape=list(x.shape),
                            data_offsets=[len(data), len(data) + len(part)])
        data += part
    head = json.dumps(header).encode("utf-8")
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def write_bin(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def write_shards(folder, weights):
    names = list(weights)
    place = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(folder / file, {name: weights[name] for name in part})
        place |= {name: file for name in part}
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_one(folder, weights):
    write_safetensors(folder / "model.safetensors", weights)


def with_prefix_and_masks(weights):
    """As newer files name them, with what old files hold beside the weights."""
    named = {"transformer." + name: x for name, x in weights.items()}
    named["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    named["lm_head.weight"] = weights["wte.weight"]
    return named


def logits_of(folder):
    with torch.no_grad():
        return load_model(folder)(torch.tensor([TOKENS]))[0].numpy()


@pytest.mark.parametrize("write", [write_one, write_shards, write_bin])
@pytest.mark.parametrize("names", [dict, with_prefix_and_masks])
def test_a_checkpoint_gives_the_logits_of_gpt2(tmp_path, write, names):
    weights = gpt2_weights()
    write_config(tmp_path)
    write(tmp_path, names(weights))
    truth = numpy_gpt2(weights, weights["wte.weight"])
    assert np.abs(logits_of(tmp_path) - truth).max() < 1e-5 * np.abs(truth).max()


def test_a_head_of_its_own_is_used(tmp_path):
    weights = gpt2_weights()
    head = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    write_config(tmp_path, tie_word_embeddings=False)
    write_one(tmp_path, weights | {"lm_head.weight": head})
    truth = numpy_gpt2(weights, head)
    assert np.abs(logits_of(tmp_path) - truth).max() < 1e-5 * np.abs(truth).max()


def test_the_activation_of_the_config_is_used(tmp_path):
    found = []
    for name in ("gelu_new", "gelu", "relu", "silu"):
        write_config(tmp_path, activation_function=name)
        write_one(tmp_path, gpt2_weights())
        found.append(logits_of(tmp_path))
    assert np.abs(found[0] - found[1]).max() < 0.02     # one is an approximation of the other
    assert np.abs(found[0] - found[2]).max() > 0.05
    assert np.abs(found[0] - found[3]).max() > 0.05


def test_half_precision_is_read(tmp_path):
    weights = {name: x.half() for name, x in gpt2_weights().items()}
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", weights, "F16")
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.wte.weight, weights["wte.weight"].float())


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_to_the_last_bit(tmp_path, tied):
    model = small_gpt(tied)
    folder = tmp_path / "a" / "b"                        # they are made
    save_model(GPT(3, 1, n_head=1, n_embd=2), folder)
    save_model(model, folder)                       # takes the place of the other one
    again = load_model(str(folder))
    assert again.config == model.config
    assert (again.lm_head.weight is again.wte.weight) == tied
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


# ---- what cannot be used is refused, in one line that names the file or the tensor

NAME = "h.1.mlp.c_fc.weight"


def refusal(folder):
    """The message with which a folder is refused."""
    with pytest.raises(UnusableInput) as refused:
        load_model(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


BAD_TENSORS = {
    "transposed": lambda w: w | {NAME: w[NAME].T},
    "one row short": lambda w: w | {NAME: w[NAME][:-1]},
    "missing": lambda w: {name: x for name, x in w.items() if name != NAME},
    "left over": lambda w: w | {"h.1.mlp.c_fc.weight.more": torch.zeros(3)},
    "nan": lambda w: w | {NAME: w[NAME] * math.nan},
    "infinite": lambda w: w | {NAME: w[NAME] / 0},
    "too large": lambda w: w | {NAME: w[NAME].double() * 1e300},
    "integers": lambda w: w | {NAME: w[NAME].int()},
    "complex": lambda w: w | {NAME: w[NAME] * 1j},
    "sparse": lambda w: w | {NAME: w[NAME].to_sparse()},
    "without numbers": lambda w: w | {NAME: w[NAME].to("meta")},
    "a number": lambda w: w | {NAME: 3},
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_an_unsound_tensor_is_refused_by_its_name(tmp_path, kind):
    write_config(tmp_path)
    write_bin(tmp_path, BAD_TENSORS[kind](gpt2_weights()))
    assert NAME in refusal(tmp_path)


def test_a_second_head_is_refused_where_the_config_ties_it(tmp_path):
    weights = gpt2_weights()
    write_config(tmp_path)
    write_one(tmp_path, weights | {"lm_head.weight": 2 * weights["wte.weight"]})
    assert "lm_head.weight is not wte.weight" in refusal(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], 3, {1: torch.zeros(2)}, {}])
def test_a_bin_file_without_named_tensors_is_refused(tmp_path, content):
    write_config(tmp_path)
    write_bin(tmp_path, content)
    refusal(tmp_path)


BAD_CONFIGS = [
    ("n_layer", 2), ("n_layer", 4), ("n_layer", 10 ** 9), ("n_layer", True), ("n_layer", 0),
    ("n_embd", 8), ("n_embd", 10 ** 10), ("n_embd", -16), ("n_embd", "16"), ("n_embd", None),
    ("n_head", 3), ("n_head", 32), ("n_head", 0), ("vocab_size", 10 ** 30), ("vocab_size", 51),
    ("vocab_size", 1.5), ("n_positions", 10 ** 18), ("n_positions", 13),
    ("activation_function", "step"), ("activation_function", ["gelu"]),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("add_cross_attention", True), ("layer_norm_epsilon", 1e-6), ("n_inner", 32),
]


@pytest.mark.parametrize("name, value", BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tmp_path, name, value):
    write_config(tmp_path, **{name: value})
    write_one(tmp_path, gpt2_weights())
    refusal(tmp_path)


def test_a_million_is_the_largest_number_in_a_config(tmp_path):
    write_config(tmp_path, vocab_size=10 ** 6)
    assert read_config(tmp_path)["vocab_size"] == 10 ** 6
    write_config(tmp_path, vocab_size=10 ** 6 + 1)
    with pytest.raises(UnusableInput, match="vocab_size = 1000001"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("file, write", [("pytorch_model.bin", write_bin),
                                         ("model.safetensors", write_one)])
@pytest.mark.parametrize("left", [0, 5, 8, 100, 3000, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, file, write, left):
    write_config(tmp_path)
    write(tmp_path, gpt2_weights())
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:left])
    assert file in refusal(tmp_path)


@pytest.mark.parametrize("header", [
    [1], {"a": 3}, {"a": {"dtype": "F32"}},
    {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [10 ** 30], "data_offsets": [0, 4 * 10 ** 30]}},
    {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [90, 106]}},
])
def test_an_absurd_header_is_refused(tmp_path, header):
    write_config(tmp_path)
    head = json.dumps(header).encode("utf-8")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(64))
    assert "model.safetensors" in refusal(tmp_path)


def test_a_header_that_is_nested_without_end_is_refused(tmp_path):
    write_config(tmp_path)
    head = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": 3}},
                                   {"weight_map": {"a": "nowhere.safetensors"}}])
def test_an_index_without_its_files_is_refused(tmp_path, index):
    write_config(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    refusal(tmp_path)


def test_a_folder_without_weights_says_what_is_wanted(tmp_path):
    write_config(tmp_path)
    assert "want model.safetensors or pytorch_model.bin" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path / "nowhere")


class Hostile:
    """A pickle that would make a file when it is loaded as an object."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    write_bin(tmp_path, gpt2_weights() | {NAME: Hostile()})
    assert "pytorch_model.bin" in refusal(tmp_path)
    assert not Path("executed").exists()


# ---- downloads, from a server in this process

class CutShort(http.server.BaseHTTPRequestHandler):
    """Announces ten bytes, and sends as many as the path says."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"x" * int(self.path[1:]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The address of a server that runs until the end of a test."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutShort)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def test_a_whole_download_is_kept(tmp_path, server):
    download(server + "/10", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"x" * 10
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_download_that_is_cut_short_is_not_kept(tmp_path, server):
    with pytest.raises(UnusableInput, match="/4: .*4 of 10"):
        download(server + "/4", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_server_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(UnusableInput, match="http://127.0.0.1:9/file: "):
        download("http://127.0.0.1:9/file", tmp_path / "file")


def test_openais_files_are_downloaded_once(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path):
        asked.append(url)
        if path.name == "config.json":
            path.write_text(json.dumps(CONFIG), encoding="utf-8")
        else:
            write_safetensors(path, gpt2_weights())

    monkeypatch.setattr(huggingface, "download", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", functools.partial(str, tmp_path))
    assert load_model("gpt2").config["n_layer"] == 3
    assert load_model("gpt2").config["n_layer"] == 3
    assert [url.rsplit("/", 1)[1] for url in asked] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["llama", "opt", None])
def test_another_kind_of_model_is_named_first(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    assert f"model_type = {kind!r}; only a GPT-2" in refusal(tmp_path)


def test_the_usual_inner_width_is_accepted(tmp_path):
    write_config(tmp_path, n_inner=64, model_type="gpt2")
    assert read_config(tmp_path)["n_embd"] == 16


def test_a_folder_for_downloads_that_cannot_be_made_is_said(monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/proc/nowhere")
    with pytest.raises(UnusableInput, match="/proc/nowhere/vbon/gpt2: .*; set TORCH_HOME"):
        load_model("gpt2")


def test_logits_that_are_not_finite_are_refused_before_any_work(tmp_path):
    model = GPT(258, 12, n_embd=16, n_head=2)
    for block in model.h:
        block.mlp.c_fc.weight.data.fill_(1e30)
    save_model(model, tmp_path)
    write_vocabulary(tmp_path, "ab")
    with pytest.raises(UnusableInput, match="the logits of this model are not finite"):
        load_pretrained(str(tmp_path))
