"""Errors in a real kernel: sentences where the package raised them, tracebacks elsewhere."""

import importlib
import inspect
import pkgutil

import nbformat
import pytest
from nbclient import NotebookClient

import w2v2nb
from w2v2nb import sentences
from w2v2nb.extract import NotFinite

LOAD, UNLOAD = "%load_ext w2v2nb.sentences", "%unload_ext w2v2nb.sentences"
CELLS = {
    "wrong configuration": "from w2v2nb.config import configure\nconfigure(epoch=3)",
    "broken recording": "from w2v2nb.audio import decode\ndecode(b'no sound')",
    "bucket": "from w2v2nb.bucket import AccessError\nraise AccessError('no credentials; log in')",
    "plain, before": "from w2v2nb import storage\nstorage.read_text('no/such/file')",
    "loaded": LOAD,
    "plain": "storage.read_text('no/such/file')",
    "whole": "%tb",
    "debugger": "import sys\nprint(repr(sys.last_value))",
    "configuration again": "configure(epoch=3)",
    "of pandas": "from w2v2nb.report import read_table\nimport pandas as pd\npd.Timestamp('never')",
    "of the person": "def mine():\n    raise ValueError('mine')\nmine()",
    "no kind of ours": "storage.join(3)",
    "unloaded": UNLOAD,
    "plain, after": "storage.read_text('no/such/file')",
}

WRONG = "finetune needs prefix, data_split_root, label_txt, exp_dir; epoch is not a parameter, did you mean epochs?"


@pytest.fixture(scope="module")
def shown():
    "What each cell shows: its error's lines, or what it prints."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()])
    NotebookClient(nb, timeout=120, kernel_name="python3", allow_errors=True).execute()
    outputs = {name: cell.outputs for name, cell in zip(CELLS, nb.cells, strict=True)}
    return {name: [line for o in found for line in o.get("traceback", [o.get("text", "")])] for name, found in outputs.items()}


def test_an_error_of_an_own_class_is_its_sentence(shown):
    assert shown["wrong configuration"] == [f"ConfigError: {WRONG}"]
    (line,) = shown["broken recording"]
    assert line.startswith("AudioError: the recording given as bytes")
    assert shown["bucket"] == ["AccessError: no credentials; log in"]


def test_a_plain_error_is_a_sentence_only_where_the_extension_is_loaded(shown):
    sentence = "FileNotFoundError: no/such/file does not exist"
    assert "Traceback" in "".join(shown["plain, before"]) and "Traceback" in "".join(shown["plain, after"])
    assert shown["loaded"] == shown["unloaded"] == []
    assert len(shown["plain"]) == 1 and shown["plain"][0].startswith(sentence) and "Traceback" not in shown["plain"][0]
    assert shown["configuration again"] == shown["wrong configuration"]


def test_the_whole_traceback_is_a_word_away(shown):
    assert "%tb" in shown["plain"][0]
    assert "Traceback" in "".join(shown["whole"]) and "read_bytes" in "".join(shown["whole"])
    assert "FileNotFoundError('no/such/file does not exist" in shown["debugger"][0]


@pytest.mark.parametrize("name", ["of pandas", "of the person", "no kind of ours"])
def test_other_errors_keep_their_traceback(shown, name):
    assert "Traceback" in "".join(shown[name])


def test_every_error_of_the_package_has_a_sentence():
    names = [module.name for module in pkgutil.iter_modules(w2v2nb.__path__) if not module.name.startswith("_")]
    found = [item for name in names for item in vars(importlib.import_module(f"w2v2nb.{name}")).values() if inspect.isclass(item)]
    errors = {item for item in found if issubclass(item, Exception) and item.__module__.startswith("w2v2nb")}
    errors -= {NotFinite}  # never leaves the extraction
    assert len(errors) >= 9
    for error in errors:
        assert hasattr(error, "_render_traceback_"), f"{error} shows a traceback; see sentences.render"


def test_an_error_with_arguments_of_its_own_is_rendered():
    from w2v2nb.loading import RecordingError

    assert RecordingError("b17", "", "decode", "it is empty")._render_traceback_() == ["RecordingError: b17: decode: it is empty"]
    assert sentences.render(ValueError()) == ["ValueError: "]
