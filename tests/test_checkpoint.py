import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from w2v2nb.checkpoint import locate
from w2v2nb.encoder import Encoder


@pytest.fixture
def copy(checkpoints, tmp_path):
    "A copy of the tiny wav2vec2 checkpoint's two JSON files, to break, and its weights."
    from safetensors.torch import load_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoints["wav2vec2"] / name).read_bytes())
    return tmp_path, load_file(checkpoints["wav2vec2"] / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_bare", [False, True])
def test_malicious_pickle_is_not_run(is_bare, copy, capfd):
    folder, weights = copy
    trap = folder / "executed"
    if is_bare:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(trap)))
    else:
        torch.save({**weights, "extra": Malicious(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not read, since a pickle can run code; get this checkpoint as model.safe"):
        Encoder.from_pretrained(folder, device="cpu")
    assert not trap.exists()
    assert capfd.readouterr().err == ""


def test_bin_of_tensors_is_read(copy, checkpoints, recordings):
    folder, weights = copy
    # the names of older torch versions, in which most checkpoints on the hub are
    old = {k.replace("parametrizations.weight.original0", "weight_g"): v for k, v in weights.items()}
    old = {k.replace("parametrizations.weight.original1", "weight_v"): v for k, v in old.items()}
    assert set(old) != set(weights)
    torch.save(old, folder / "pytorch_model.bin")
    expected = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu").embed(recordings)
    assert torch.allclose(Encoder.from_pretrained(folder, device="cpu").embed(recordings), expected, atol=1e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files(suffix, copy, checkpoints, recordings):
    from safetensors.torch import save_file

    folder, weights = copy
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    files = {key: name.replace(".", f"-0000{1 + i % 2}-of-00002.", 1) for i, key in enumerate(sorted(weights))}
    for file in {*files.values()}:
        part = {key: weights[key] for key in weights if files[key] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))
    expected = Encoder.from_pretrained(checkpoints["wav2vec2"], device="cpu").embed(recordings)
    assert torch.equal(Encoder.from_pretrained(folder, device="cpu").embed(recordings), expected)
    os.remove(folder / file)
    with pytest.raises(ValueError, match="cannot be loaded"):
        Encoder.from_pretrained(folder, device="cpu")


def test_missing_weights_are_named(copy, capfd):
    from safetensors.torch import save_file

    folder, weights = copy
    for name in ("masked_spec_embed", "encoder.layers.1.final_layer_norm.bias"):
        weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"would be random: encoder\.layers\.1\.final_layer_norm\.bias; get the whole"):
        Encoder.from_pretrained(folder, device="cpu")
    assert capfd.readouterr().err == ""


def test_other_sizes_are_named(copy):
    from safetensors.torch import save_file

    folder, weights = copy
    weights["feature_projection.projection.bias"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"feature_projection\.projection\.bias of size \(7,\) for \(16,\)"):
        Encoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_broken_weights(name, content, copy):
    if content is not None:
        (copy[0] / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*get the whole checkpoint again|is not read"):
        Encoder.from_pretrained(copy[0], device="cpu")


def test_refused_configurations(copy, tmp_path):
    folder, _ = copy
    edit_config(folder, model_type="wav2vec2-bert", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(ValueError, match="'wav2vec2-bert'; supported are wav2vec2, hubert, wavlm, data2vec-audio, unis"):
        Encoder.from_pretrained(folder)
    edit_config(folder, model_type="wav2vec2", add_adapter=True)
    with pytest.raises(ValueError, match="add_adapter"):
        Encoder.from_pretrained(folder)
    edit_config(folder, classifiers=[["breathy"]])
    with pytest.raises(ValueError, match="Classifier.load"):
        Encoder.from_pretrained(folder)
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match="should hold a JSON object"):
        Encoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json \(it holds: preprocessor_config.json\)"):
        Encoder.from_pretrained(folder)


def test_wrong_paths(copy):
    folder, _ = copy
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        locate(folder / "config.json")
    for path in (folder / "none", "./none", "a/b/c", "none"):
        with pytest.raises(FileNotFoundError, match="there is no such folder, and it is not a hub name"):
            locate(path)


def test_code_of_a_checkpoint_is_not_looked_at(copy, checkpoints):
    folder, _ = copy
    edit_config(folder, auto_map={"AutoModel": "modeling_evil.Model", "AutoConfig": "modeling_evil.Config"})
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(folder / 'executed')!r})")
    (folder / "model.safetensors").write_bytes((checkpoints["wav2vec2"] / "model.safetensors").read_bytes())
    Encoder.from_pretrained(folder, device="cpu")
    assert not (folder / "executed").exists()


# --- the hub: a server on this machine that answers as the hub does


class Hub(BaseHTTPRequestHandler):
    "Serves `server.files` (name -> bytes) as the repository owner/tiny."

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files, commit, path = self.server.files, "a" * 40, self.path.partition("?")[0]
        self.server.asked.append(path)
        headers = {"X-Repo-Commit": commit}
        if path.startswith("/api/models/owner/tiny/tree/"):
            body = [{"type": "file", "path": k, "size": len(v), "oid": f"{i:040d}"} for i, (k, v) in enumerate(files.items())]
            body = json.dumps(body).encode()
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "owner/tiny", "sha": commit, "siblings": siblings}).encode()
        elif path.startswith("/owner/tiny/resolve/") and path.rpartition("/")[2] in files:
            body = files[path.rpartition("/")[2]]
            headers["ETag"] = f'"{hash(body):x}"'
        else:
            body, headers = b"{}", {"X-Error-Code": "RepoNotFound"}
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(checkpoints, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {path.name: path.read_bytes() for path in checkpoints["wav2vec2"].iterdir()}
    server.files, server.asked = {**files, "pytorch_model.bin": b"not wanted", "README.md": b"hello"}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_locate(name, port, home, **environment):
    "What `locate` prints in a process of its own, since the hub's library reads its settings when imported."
    code = f"from w2v2nb.checkpoint import download\ntry: print(download({name!r}, timeout_s=1))\nexcept OSError as e: print(e)"
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        env={**inherited, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run.stdout.strip()


def test_download_then_offline(hub, tmp_path):
    port = hub.server_address[1]
    folder = Path(run_locate("owner/tiny", port, tmp_path))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    n_asked = len(hub.asked)
    assert run_locate("owner/tiny", port, tmp_path, HF_HUB_OFFLINE="1") == str(folder)
    assert len(hub.asked) == n_asked
    assert "has no public model of this name; on a connected" in run_locate("owner/other", port, tmp_path)
    Encoder.from_pretrained(folder, device="cpu")


def test_download_of_a_bin(hub, tmp_path):
    hub.files.pop("model.safetensors")
    folder = Path(run_locate("owner/tiny", hub.server_address[1], tmp_path))
    assert sorted(os.listdir(folder)) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("is_silent", [False, True])
def test_hub_out_of_reach(is_silent, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if is_silent:  # takes connections and never answers
            server.listen()
        answer = run_locate("owner/tiny", server.getsockname()[1], tmp_path)
    assert "cannot be reached" in answer and "hf download owner/tiny --local-dir FOLDER" in answer
    assert "\n" not in answer
