"""Hugging Face folders: models read, written and refused; downloads."""
import http.server
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import small_gpt

from model import GPT
from support import huggingface
from support.files import UnusableInput
from support.huggingface import (download, load_model, read_config, read_safetensors, save_model,
                                 write_safetensors)

# -------------------------------------------------------------------------------- GPT-2's own files

CONFIG = dict(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=4,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NAME = "h.1.mlp.c_fc.weight"
SAFE = "model.safetensors"
OLD = "pytorch_model.bin"


def gpt2_weights():
    """Random tensors under the names and shapes of a GPT-2 checkpoint."""
    shapes = {"wte.weight": (50, 16), "wpe.weight": (12, 16),
              "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for h in ("h.0.", "h.1."):
        parts = {"ln_1": (16,), "attn.c_attn": (16, 48), "attn.c_proj": (16, 16),
                 "ln_2": (16,), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
        for name, shape in parts.items():
            shapes[h + name + ".weight"] = shape
            shapes[h + name + ".bias"] = shape[-1:]
    g = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


W = gpt2_weights()
HEAD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))


def gelu_new(u):
    return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))


def numpy_gpt2(head, activation):
    """GPT-2's logits (T, V) of TOKENS, written a second time, in float64."""
    w = {name: x.double().numpy() for name, x in W.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    T = len(TOKENS)
    x = w["wte.weight"][TOKENS] + w["wpe.weight"][:T]
    for h in ("h.0.", "h.1."):
        q, k, v = np.split(linear(norm(x, h + "ln_1"), h + "attn.c_attn"), 3, -1)
        heads = []
        for i in (0, 4, 8, 12):
            score = q[:, i:i + 4] @ k[:, i:i + 4].T / 2
            prob = np.exp(np.where(np.tri(T, dtype=bool), score, -np.inf))
            heads.append(prob / prob.sum(-1, keepdims=True) @ v[:, i:i + 4])
        x = x + linear(np.concatenate(heads, -1), h + "attn.c_proj")
        u = activation(linear(norm(x, h + "ln_2"), h + "mlp.c_fc"))
        x = x + linear(u, h + "mlp.c_proj")
    return norm(x, "ln_f") @ head.double().numpy().T


def safetensors(header, data=bytes(64)):
    head = json.dumps(header).encode("utf-8")
    return len(head).to_bytes(8, "little") + head + data


def write_folder(folder, weights=W, file=SAFE, **changes):
    """A config.json with these changes, and weights in one of the two formats."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    if file == OLD:
        torch.save(weights, folder / file)
        return
    # the format of safetensors, written a second time
    names = {torch.float32: "F32", torch.float16: "F16", torch.bool: "BOOL"}
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in weights.items():
        part = x.contiguous().numpy().tobytes()
        header[name] = dict(dtype=names[x.dtype], shape=list(x.shape),
                            data_offsets=[len(data), len(data) + len(part)])
        data += part
    (folder / file).write_bytes(safetensors(header, data))


def with_prefix_and_masks(weights):
    """As newer files name them, with what old files hold beside the weights."""
    named = {"transformer.h.0.attn.bias": torch.ones(1, 1, 11, 11, dtype=torch.bool)}
    named |= {"transformer." + name: x for name, x in weights.items()}
    return named | {"lm_head.weight": weights["wte.weight"]}


@pytest.mark.parametrize("weights, changes, head, activation", [
    (W, {}, W["wte.weight"], gelu_new),
    (with_prefix_and_masks(W), {"n_inner": 64, "model_type": "gpt2"}, W["wte.weight"], gelu_new),
    (W | {"lm_head.weight": HEAD}, {"tie_word_embeddings": False, "activation_function": "relu"},
     HEAD, lambda u: np.maximum(u, 0))])
@pytest.mark.parametrize("file", [SAFE, OLD])
def test_a_checkpoint_gives_the_logits_of_gpt2(tmp_path, file, weights, changes, head, activation):
    write_folder(tmp_path, weights, file, **changes)
    with torch.no_grad():
        logits = load_model(tmp_path)(torch.tensor([TOKENS]))[0].numpy()
    truth = numpy_gpt2(head, activation)
    assert np.abs(logits - truth).max() < 1e-5 * np.abs(truth).max()


def test_data_at_an_odd_byte_and_in_half_precision_are_read(tmp_path):
    # the 121 bytes of a mask come first
    weights = with_prefix_and_masks({name: x.half() for name, x in W.items()})
    write_folder(tmp_path, weights)
    for name, x in read_safetensors(tmp_path / SAFE).items():
        assert torch.equal(x, weights[name])
        assert x.data_ptr() % 4 == 0
    assert load_model(tmp_path).wte.weight.dtype == torch.float32


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


@pytest.mark.parametrize("name", ["a", "ab", "abc"])
def test_data_are_written_at_a_multiple_of_eight_bytes(tmp_path, name):
    write_safetensors(tmp_path / SAFE, {name: torch.ones(3)})
    assert (tmp_path / SAFE).read_bytes()[0] % 8 == 0
    assert torch.equal(read_safetensors(tmp_path / SAFE)[name], torch.ones(3))

# ------------------------------------ what cannot be used is refused, in one line that names it

def refusal(folder):
    """The message with which a folder is refused."""
    with pytest.raises(UnusableInput) as refused:
        load_model(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("x", [
    W[NAME].T, W[NAME][:-1], W[NAME][None], W[NAME] * math.nan, W[NAME] / 0,
    W[NAME].double() * 1e300, W[NAME].int(), W[NAME] * 1j, W[NAME].to_sparse(),
    W[NAME].to("meta"), 3, {"weight": W[NAME]}])
def test_an_unsound_tensor_is_refused_by_its_name(tmp_path, x):
    write_folder(tmp_path, W | {NAME: x}, OLD)
    assert NAME in refusal(tmp_path)


def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path):
    write_folder(tmp_path, W | {NAME + ".more": torch.zeros(3)})
    assert f"{NAME}.more: want None, got [3]" in refusal(tmp_path)
    write_folder(tmp_path, {name: x for name, x in W.items() if name != NAME})
    assert f"{NAME}: want [64, 16], got None" in refusal(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_a_head_of_its_own_is_refused_unless_the_config_unties_it(tmp_path, changes):
    write_folder(tmp_path, W | {"lm_head.weight": HEAD}, **changes)
    assert 'want "tie_word_embeddings": false in config.json' in refusal(tmp_path)


@pytest.mark.parametrize("name, value", [
    ("n_layer", 1), ("n_layer", 3), ("n_layer", True), ("n_layer", 0),
    ("n_embd", 8), ("n_embd", 10 ** 10), ("n_embd", -16), ("n_embd", "16"), ("n_embd", None),
    ("n_head", 3), ("n_head", 32), ("n_head", 0), ("vocab_size", 10 ** 6 + 1), ("vocab_size", 51),
    ("vocab_size", 1.5), ("n_positions", 10 ** 18), ("n_positions", 13), ("n_inner", 32),
    ("activation_function", "step"), ("activation_function", ["gelu"]),
    ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("add_cross_attention", True), ("layer_norm_epsilon", 1e-6), ("tie_word_embeddings", "no"),
    ("model_type", "llama"), ("model_type", None)])
def test_a_config_that_does_not_fit_is_refused(tmp_path, name, value):
    write_folder(tmp_path, **{name: value})
    message = refusal(tmp_path)
    assert ("python -m experiments.with_trl" in message) == (name == "model_type")


def test_a_million_is_the_largest_number_in_a_config(tmp_path):
    write_folder(tmp_path, vocab_size=10 ** 6)
    assert read_config(tmp_path)["vocab_size"] == 10 ** 6


DAMAGED = [("config.json", content) for content in (b"", b"[1]", b"\xff\xfe", b"[" * 100_000)]
for _entry in (3, {}, {"dtype": "F32"}, {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
               {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
               {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
               {"dtype": "F32", "shape": [10 ** 30], "data_offsets": [0, 4 * 10 ** 30]},
               {"dtype": "F32", "shape": [2, 2], "data_offsets": [90, 106]}):
    DAMAGED.append((SAFE, safetensors({"a": _entry})))
DAMAGED += [(SAFE, safetensors([1])), (SAFE, (100_000).to_bytes(8, "little") + b"[" * 100_000)]
# the first bytes of a sound file
DAMAGED += [(SAFE, left) for left in (0, 5, 8, 100, 3000, -1)]
DAMAGED += [(OLD, left) for left in (0, 5, 8, 100, 3000, -1)]


@pytest.mark.parametrize("file, content", DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, file, content):
    write_folder(tmp_path, file=OLD if file == OLD else SAFE)
    if isinstance(content, int):
        content = (tmp_path / file).read_bytes()[:content]
    (tmp_path / file).write_bytes(content)
    assert file in refusal(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], 3, {1: torch.zeros(2)}, {}])
def test_a_bin_file_without_named_tensors_is_refused(tmp_path, content):
    write_folder(tmp_path, content, OLD)
    refusal(tmp_path)


def test_a_folder_without_one_file_of_weights_says_what_is_wanted(tmp_path):
    write_folder(tmp_path, file="model-00001-of-00002.safetensors")
    assert "want model.safetensors or pytorch_model.bin (not in parts)" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path / "nowhere")


class Hostile:
    """A pickle that would make a file when it is loaded as an object."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pickled_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, W | {NAME: Hostile()}, OLD)
    assert OLD in refusal(tmp_path)
    assert not Path("executed").exists()

# --------------------------------------------------------- downloads, from a server in this process

class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, but only four bytes of the one that is named cut."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read(4 if self.path == "/cut" else -1))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the folder "served" that runs until the end of a test."""
    (tmp_path / "served").mkdir()
    monkeypatch.chdir(tmp_path / "served")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def test_openais_files_are_downloaded_once(tmp_path, monkeypatch, server):
    write_folder(tmp_path / "served")
    monkeypatch.setattr(huggingface, "DOWNLOAD", server + "/{file}?{name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert torch.equal(load_model("gpt2").wte.weight, W["wte.weight"])
    for file in ("config.json", SAFE):
        (tmp_path / "served" / file).unlink()
    assert torch.equal(load_model("gpt2").wte.weight, W["wte.weight"])
    kept = {path.name for path in (tmp_path / "home/hub/vbon/gpt2").iterdir()}
    assert kept == {"config.json", SAFE}


def test_a_download_that_fails_is_named_and_not_kept(tmp_path, monkeypatch, server):
    (tmp_path / "served" / "cut").write_bytes(b"x" * 10)
    for url, message in ((server + "/cut", "/cut: .* got only 4 out of 10 bytes"),
                         (server + "/nowhere", "/nowhere: HTTP Error 404"),
                         ("http://127.0.0.1:9/file", "http://127.0.0.1:9/file: ")):
        with pytest.raises(UnusableInput, match=message):
            download(url, tmp_path / "file")
        assert not (tmp_path / "file").exists()
    monkeypatch.setenv("TORCH_HOME", "/proc/nowhere")
    with pytest.raises(UnusableInput, match="/proc/nowhere.*set TORCH_HOME"):
        load_model("gpt2")
