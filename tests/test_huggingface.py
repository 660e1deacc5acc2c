"""Hugging Face folders: models read, written and refused; downloads."""
import json
import math
import socket
import sys
import threading

import numpy as np
import pytest
import torch
from test_model import small_gpt

from support import huggingface
from support.files import UnusableInput
from support.huggingface import (download, load_model, read_safetensors, save_model,
                                 write_safetensors)

# -------------------------------------------------------------------------------- GPT-2's own files

CONFIG = dict(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=4,
              activation_function="gelu_new", layer_norm_epsilon=1e-5)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NAME = "h.1.mlp.c_fc.weight"
SAFE = "model.safetensors"
OLD = "pytorch_model.bin"


def gpt2_weights():
    """Random tensors under the names and shapes of a GPT-2 checkpoint, without the last bits."""
    shapes = {"wte.weight": (50, 16), "wpe.weight": (12, 16),
              "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for h in ("h.0.", "h.1."):
        parts = {"ln_1": (16,), "attn.c_attn": (16, 48), "attn.c_proj": (16, 16),
                 "ln_2": (16,), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
        for name, shape in parts.items():
            shapes[h + name + ".weight"] = shape
            shapes[h + name + ".bias"] = shape[-1:]
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) / 3 for name, shape in shapes.items()}
    return {name: x.half().float() for name, x in tensors.items()}


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


def write_folder(folder, weights=W, file=SAFE, **changes):
    """A config.json with these changes, and weights in one of the two formats."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    if file == OLD:
        torch.save(weights, folder / file)
    else:
        write_safetensors(folder / file, weights)


# named as in newer files, in half precision, with what old files hold beside the weights
RENAMED = {"transformer." + name: x.half() for name, x in W.items()}
RENAMED["transformer.h.0.attn.bias"] = torch.ones(1, 1, 11, 11, dtype=torch.bool)
RENAMED["lm_head.weight"] = W["wte.weight"]


@pytest.mark.parametrize("weights, changes, head, activation", [
    (W, {}, W["wte.weight"], gelu_new),
    (RENAMED, {"n_inner": 64, "model_type": "gpt2"}, W["wte.weight"], gelu_new),
    (W | {"lm_head.weight": HEAD}, {"tie_word_embeddings": False, "activation_function": "relu"},
     HEAD, lambda u: np.maximum(u, 0))])
@pytest.mark.parametrize("file", [SAFE, OLD])
def test_a_checkpoint_gives_the_logits_of_gpt2(tmp_path, file, weights, changes, head, activation):
    write_folder(tmp_path, weights, file, **changes)
    with torch.no_grad():
        logits = load_model(tmp_path)(torch.tensor([TOKENS]))[0].numpy()
    truth = numpy_gpt2(head, activation)
    assert np.abs(logits - truth).max() < 1e-5 * np.abs(truth).max()


def safetensors(header, data=bytes(64)):
    head = json.dumps(header).encode("utf-8")
    return len(head).to_bytes(8, "little") + head + data


@pytest.mark.parametrize("dtype, data", [
    ("F64", "000000000000f03f 00000000000000c0"), ("F32", "0000803f 000000c0"),
    ("F16", "003c 00c0"), ("BF16", "803f 00c0")])
def test_numbers_are_read_from_any_byte_on(tmp_path, dtype, data):
    data = b"\x01" + bytes.fromhex(data)
    header = {"__metadata__": {}, "mask": dict(dtype="BOOL", shape=[], data_offsets=[0, 1]),
              "x": dict(dtype=dtype, shape=[2, 1], data_offsets=[1, len(data)])}
    (tmp_path / SAFE).write_bytes(safetensors(header, data))
    found = read_safetensors(tmp_path / SAFE)
    assert {name: x.tolist() for name, x in found.items()} == {"mask": True, "x": [[1], [-2]]}
    assert found["x"].data_ptr() % 4 == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_to_the_last_bit(tmp_path, tied):
    model = small_gpt(tied)
    folder = tmp_path / "a" / "b"                        # they are made
    save_model(model, folder)
    again = load_model(str(folder))
    assert again.config == model.config
    assert (again.lm_head.weight is again.wte.weight) == tied
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_data_are_written_at_a_multiple_of_eight_bytes(tmp_path):
    for name in ("a", "ab"):
        write_safetensors(tmp_path / SAFE, {name: torch.ones(3)})
        assert (tmp_path / SAFE).read_bytes()[0] % 8 == 0

# ------------------------------------ what cannot be used is refused, in one line that names it

def refusal(folder):
    """The message with which a folder is refused."""
    with pytest.raises(UnusableInput) as refused:
        load_model(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


class Hostile:
    """A pickle that would end the program when it is loaded as an object."""

    def __reduce__(self):
        return sys.exit, ()


MISSING = {name: x for name, x in W.items() if name != NAME}
UNSOUND = [W[NAME].T, W[NAME][None], W[NAME] * math.nan, W[NAME].double() * 1e300, W[NAME].int(),
           W[NAME].to_sparse(), W[NAME].to("meta"), 3]


@pytest.mark.parametrize("weights, says", [
    *[(W | {NAME: x}, NAME) for x in UNSOUND], (MISSING, f"{NAME}: want [64, 16], got None"),
    (W | {NAME + ".more": torch.zeros(3)}, f"{NAME}.more: want None, got [3]"),
    (W | {"lm_head.weight": HEAD}, 'want "tie_word_embeddings": false in config.json'),
    (W | {NAME: Hostile()}, OLD), ([1, 2], OLD), (3, OLD), ({1: torch.zeros(2)}, "1: want"),
    ({}, "want [50, 16], got None")])
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, says):
    write_folder(tmp_path, weights, OLD)
    assert says in refusal(tmp_path)


SIZES = [("n_layer", True), ("n_layer", 0), ("n_embd", "16"), ("n_embd", None), ("n_embd", 18),
         ("vocab_size", 10 ** 6 + 1)]
SHAPES = [("n_layer", 3), ("n_embd", 8), ("n_positions", 13), ("vocab_size", 10 ** 6)]
FIXED = [("n_inner", 32), ("activation_function", ["gelu"]), ("scale_attn_weights", False),
         ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True),
         ("layer_norm_epsilon", 1e-6), ("tie_word_embeddings", "no")]


@pytest.mark.parametrize("name, value, says", [
    *[(name, value, f"{name}: want ") for name, value in SIZES + FIXED],
    *[(name, value, "weight: want [") for name, value in SHAPES],
    ("model_type", None, "want model_type gpt2, got None; for others, python -m experiments.with")])
def test_a_config_that_does_not_fit_is_refused(tmp_path, name, value, says):
    write_folder(tmp_path, **{name: value})
    assert says in refusal(tmp_path)


DAMAGED = [("config.json", content) for content in (b"", b"[1]", b"\xff\xfe", b"[" * 100_000)]
for _entry in (3, {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
               {"dtype": "F32", "shape": [10 ** 30], "data_offsets": [0, 4 * 10 ** 30]},
               {"dtype": "F32", "shape": [2, 2], "data_offsets": [90, 106]}):
    DAMAGED.append((SAFE, safetensors({"a": _entry})))
DAMAGED += [(SAFE, safetensors([1])), (SAFE, (100_000).to_bytes(8, "little") + b"[" * 100_000)]
# the first bytes of a sound file
for _left in (0, 5, 8, 100, 3000, -1):
    DAMAGED += [(SAFE, _left), (OLD, _left)]


@pytest.mark.parametrize("file, content", DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, file, content):
    write_folder(tmp_path, file=OLD if file == OLD else SAFE)
    if isinstance(content, int):
        content = (tmp_path / file).read_bytes()[:content]
    (tmp_path / file).write_bytes(content)
    assert file in refusal(tmp_path)


def test_a_folder_without_one_file_of_weights_says_what_is_wanted(tmp_path):
    write_folder(tmp_path, file="model-00001-of-00002.safetensors")
    assert "want model.safetensors or pytorch_model.bin (not in parts)" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path / "nowhere")

# --------------------------------------------------------------------------------------- downloads

def test_openais_files_are_downloaded_once(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    write_folder(tmp_path / "gpt2")
    monkeypatch.setattr(huggingface, "DOWNLOAD", tmp_path.as_uri() + "/{name}/{file}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert torch.equal(load_model("gpt2").wte.weight, W["wte.weight"])
    (tmp_path / "gpt2").rename(tmp_path / "gone")
    assert torch.equal(load_model("gpt2").wte.weight, W["wte.weight"])
    kept = {path.name for path in (tmp_path / "home/hub/vbon/gpt2").iterdir()}
    assert kept == {"config.json", SAFE}


def break_off(listener):
    """Answer one request with four of ten bytes."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfour")


def test_a_download_that_fails_is_named_and_not_kept(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=break_off, args=[listener], daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
        with pytest.raises(UnusableInput, match=f"{url}: .* got only 4 out of 10 bytes"):
            download(url, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    monkeypatch.setenv("TORCH_HOME", "/proc/nowhere")
    with pytest.raises(UnusableInput, match="/proc/nowhere.*set TORCH_HOME"):
        load_model("gpt2")
