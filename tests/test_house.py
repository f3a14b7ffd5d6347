"""The house: one place for name, version and requirements; what is declared, pinned, packaged, tracked and documented."""

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).parent.parent
package = root / "w2v2nb"
assets = package / "assets"

settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def read_requirements(key):
    return [Requirement(line) for line in cfg[key].splitlines() if line.strip()]


requirements, dev_requirements = read_requirements("requirements"), read_requirements("dev_requirements")
vertex_requirements = read_requirements("vertex_requirements")
declared = {canonicalize_name(r.name) for r in requirements}
dev_declared = {canonicalize_name(r.name) for r in dev_requirements}
bench_lines = (root / "tools" / "bench_requirements.txt").read_text(encoding="utf-8").splitlines()
benchmarked = {canonicalize_name(Requirement(line).name) for line in bench_lines if line and not line.startswith("#")}

# what a distribution is called in an import statement, where that isn't its own name
import_names = {"scikit-learn": "sklearn", "pyyaml": "yaml", "ipython": "IPython"}
import_names |= {"jupyter-scatter": "jscatter", "umap-learn": "umap", "pillow": "PIL"}
import_names |= {"google-cloud-storage": "google", "google-cloud-aiplatform": "google"}
# declared but imported nowhere, and why
used_otherwise = {}
# development tools that are started, not imported, and limits on what nbdev brings along
dev_used_otherwise = {"nbdev", "execnb", "ghapi", "jupytext", "ruff", "gcp-storage-emulator", "jupyterlab", "notebook"}

mib = 1024 * 1024
python_versions = ["3.10", "3.11", "3.12", "3.13"]
audio_suffixes = set(".wav .flac .ogg .mp3 .m4a .webm .opus .amr .wma .aac .aiff .mp4 .mkv .mov .raw".split())
pickle_suffixes = set(".pkl .pickle .pt .pth .bin .joblib .npy .npz".split())


def import_name(distribution):
    return import_names.get(distribution, distribution.replace("-", "_"))


def third_party(source):
    "The top-level names that a Python source imports, anywhere in it, but the standard library's and our own."
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)  # IPython's magic
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"w2v2nb", "conftest", "cloud", "browser"}


def read_source(path):
    "The Python of a module or of a notebook's code cells."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def modules():
    return sorted(p for p in package.glob("*.py") if p.name != "_modidx.py")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def tracked():
    "Files in git, and new ones that git doesn't ignore."
    if not (root / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git checkout, so nothing says which files are tracked")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = [root / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy and without the network."
    copy = tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (root / name).exists():
            shutil.copy(root / name, copy)
    shutil.copytree(package, copy / "w2v2nb", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(copy / "dist"), str(copy)]
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, f"the wheel can't be built:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


@pytest.fixture(scope="session")
def metadata(wheel):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return importlib.metadata.PathDistribution(zipfile.Path(wheel, name.removesuffix("METADATA"))).metadata


# One place for name, version and requirements


def test_setup_py_carries_no_facts_of_its_own():
    tree = ast.parse((root / "setup.py").read_text(encoding="utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    facts = {cfg["lib_name"], cfg["version"], cfg["description"], *map(str, requirements + dev_requirements)}
    for keyword in call.keywords:
        if keyword.arg in ("packages", "package_data"):
            continue
        literal = {n.value for n in ast.walk(keyword.value) if isinstance(n, ast.Constant)} & facts
        assert not literal, f"setup.py says {keyword.arg}={literal}; read it from settings.ini"


def test_pyproject_carries_no_facts_of_its_own():
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    assert "[project]" not in text, (
        "nbdev_export has written a pyproject.toml whose dynamic fields setup.py doesn't fill; "
        "delete it and put `update_pyproject = False` into settings.ini"
    )


def test_module_has_the_version():
    assert run_python("import w2v2nb; print(w2v2nb.__version__)") == cfg["version"]


def test_wheel_has_the_settings(metadata):
    assert metadata["Name"] == cfg["lib_name"]
    assert metadata["Version"] == cfg["version"]
    assert metadata["Summary"] == cfg["description"]
    assert metadata["Requires-Python"] == f">={cfg['min_python']}"
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {str(r) for r in required if "extra" not in str(r.marker)} == {str(r) for r in requirements}
    for extra, wanted in {"dev": dev_requirements, "vertex": vertex_requirements}.items():
        found = {(r.name, str(r.specifier)) for r in required if f'extra == "{extra}"' in str(r.marker)}
        assert found == {(r.name, str(r.specifier)) for r in wanted}


def test_extras_are_tested():
    assert {*map(str, vertex_requirements)} <= {*map(str, dev_requirements)}, "an extra that isn't installed can't be tested"


def test_wheel_has_modules_assets_and_command(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n and not n.endswith("/")}
    on_disk = {p.relative_to(root).as_posix() for p in [*package.glob("*.py"), *assets.rglob("*")] if p.is_file()}
    assert names == on_disk, f"only in one of wheel and folder: {sorted(names ^ on_disk)[:10]}"
    entry_points = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert cfg["console_scripts"].replace("=", " = ") in wheel.read(entry_points).decode()
    assert any(n.endswith("LICENSE") for n in wheel.namelist())


# Requirements


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_what_a_module_imports_is_declared(path):
    missing = third_party(read_source(path)) - {import_name(d) for d in declared}
    assert not missing, f"{path.name} imports {', '.join(sorted(missing))}; declare it in settings.ini's requirements"


def test_what_run_notebooks_import_is_declared():
    for path in (root / "nbs" / "runs").glob("*.ipynb"):
        missing = third_party(read_source(path)) - {import_name(d) for d in declared}
        assert not missing, f"{path.name} imports {', '.join(sorted(missing))}; declare it in settings.ini's requirements"


def test_what_tests_tools_and_notebooks_import_is_declared():
    paths = [*(root / "tests").glob("*.py"), *(root / "tools").glob("*.py"), *(root / "nbs").glob("*.ipynb")]
    names = {import_name(d) for d in declared | dev_declared | benchmarked} | {"setuptools"}
    names |= {path.stem for path in (root / "tools").glob("*.py")}  # one tool may import another
    missing = {path.name: sorted(found) for path in paths if (found := third_party(read_source(path)) - names)}
    assert not missing, f"imported but not declared: {missing}; add to settings.ini's dev_requirements"


def test_what_is_declared_is_imported():
    sources = [*modules(), *(root / "nbs" / "runs").glob("*.ipynb")]
    imported = set().union(*(third_party(read_source(path)) for path in sources))
    unused = {d for d in declared if import_name(d) not in imported}
    assert unused <= set(used_otherwise), f"declared but never imported: {sorted(unused - set(used_otherwise))}"
    dev_sources = [*(root / "tests").glob("*.py"), *(root / "tools").glob("*.py"), *(root / "nbs").glob("*.ipynb")]
    dev_imported = set().union(*(third_party(read_source(path)) for path in dev_sources))
    dev_unused = {d for d in dev_declared if import_name(d) not in dev_imported} - dev_used_otherwise
    assert not dev_unused, f"development requirements never imported: {sorted(dev_unused)}"


def test_the_exceptions_are_still_true():
    assert set(used_otherwise) <= declared and dev_used_otherwise <= dev_declared
    imported = set().union(*(third_party(read_source(path)) for path in modules()))
    stale = {d for d in used_otherwise if import_name(d) in imported}
    assert not stale, f"{sorted(stale)} is imported by now; take it out of used_otherwise"


def test_development_tools_are_not_for_users():
    assert not declared & {"nbdev", "fastcore", "execnb", "ghapi", "pytest", "ruff", "jupytext"}


def test_torch_and_torchaudio_are_a_pair():
    pins = {r.name: str(r.specifier) for r in requirements if r.name in ("torch", "torchaudio")}
    assert len(pins) == 2 and len(set(pins.values())) == 1 and pins["torch"].startswith("=="), pins


@pytest.mark.parametrize("python_version", python_versions)
def test_constraints_pin_every_requirement(python_version):
    environment = default_environment() | {
        "python_version": python_version,
        "python_full_version": f"{python_version}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if line.strip() and not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"constraints.txt pins {name} twice for Python {python_version}"
            pins[name] = pin
    for wanted in requirements + dev_requirements:
        if wanted.marker is not None and not wanted.marker.evaluate(environment):
            continue
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin, f"constraints.txt has no {wanted.name} for Python {python_version}; run `make constraints`"
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"constraints.txt should pin {pin} with =="
        assert wanted.specifier.contains(specifier.version), f"{pin} isn't {wanted}; run `make constraints`"


# Imports


def loaded_after(*names):
    "Top-level packages loaded once the given modules are imported, in a process of their own."
    code = f"import sys, importlib; [importlib.import_module(n) for n in {names!r}]; print(*sys.modules, sep='\\n')"
    return set(run_python(code).splitlines())


def test_the_package_itself_imports_nothing():
    assert not loaded_after("w2v2nb") & {"torch", "numpy", "pandas", "transformers", "matplotlib"}


def test_modules_about_files_and_tables_import_no_torch():
    names = [f"w2v2nb.{name}" for name in ("samples", "storage", "data", "metrics", "report", "config", "vertex")]
    assert not loaded_after(*names) & {"torch", "torchaudio", "transformers"}


def test_cloud_widgets_and_pictures_wait_until_they_are_used():
    drawing = {"__init__", "__main__", "report", "seconds", "maps"}
    drawing |= {"views", "browse", "tryout", "mistakes", "embedding_map", "comparison", "rating", "form", "explore"}
    names = [f"w2v2nb.{path.stem}" for path in modules() if path.stem not in drawing]
    heavy = {"google.cloud.storage", "google.cloud.aiplatform_v1"}
    heavy |= {"ipywidgets", "matplotlib", "librosa", "sklearn", "papermill", "IPython"}
    assert not loaded_after(*names) & heavy


# Makefile, CI, documents


def read_makefile():
    "Target -> (its help, its recipe's lines)."
    targets, name = {}, None
    for line in (root / "Makefile").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([\w.$()/-]+):(?!=)(.*)", line):
            name = found[1]
            targets[name] = (found[2].partition("##")[2].strip(), [])
        elif line.startswith("\t") and name:
            targets[name][1].append(line.strip())
    return targets


def run_make(folder, *arguments):
    if not shutil.which("make"):
        pytest.skip("there is no make on this machine")
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}  # of `make test`
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_prints_its_targets():
    printed = run_make(root)
    phony = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    assert {"setup", "demo", "test", "wheel", "export", "outputs", "notebooks", "constraints"} <= set(phony)
    for name in phony:
        assert re.search(rf"^make {name}\s+\S+", printed, re.M), f"`make` doesn't say what `make {name}` is for"


@pytest.mark.parametrize("target, last", [("demo", "w2v2nb demo"), ("test", "pytest")])
def test_demo_and_test_take_a_fresh_machine_all_the_way(target, last, tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    planned = run_make(tmp_path, "--dry-run", f"PYTHON={sys.executable}", target)
    places = [planned.find(step) for step in ("-m venv", "pip install", last)]
    assert -1 not in places and places == sorted(places), planned
    assert "-c constraints.txt" in planned
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    planned = run_make(tmp_path, "--dry-run", f"PYTHON={sys.executable}", target)
    assert "venv .venv" not in planned and last in planned, "an environment that is ready should be used as it is"


def test_ci_runs_its_steps_in_order():
    path = root / ".ci" / "run"
    assert path.is_file() and os.access(path, os.X_OK), ".ci/run should be there and executable"
    recipes = {name: "\n".join(lines) for name, (_, lines) in read_makefile().items()}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    script = re.sub(r"\bmake\s+(?:-\S+\s+)*([a-z]+)", lambda found: recipes.get(found[1], found[0]), "\n".join(lines))
    steps = {
        "clean the notebooks": r"nbdev_clean",
        "delete the modules": r"\brm\b.*w2v2nb|find w2v2nb.*-delete",
        "export the modules": r"nbdev_export",
        "remake README.md": r"tools/readme\.py",
        "fail on any difference": r"git status --porcelain|git diff",
        "ruff": r"\bruff\W+(?:check|\S*/ruff check)|\bruff check",
        "test the notebooks": r"nbdev_test",
        "pytest": r"\bpytest\b",
    }
    places = {}
    for step, pattern in steps.items():
        found = re.search(pattern, script)
        assert found, f".ci/run doesn't {step}"
        places[step] = found.start()
    assert list(places) == sorted(places, key=places.get), f"steps out of order: {sorted(places, key=places.get)}"
    assert not re.search(r"-uno|--untracked-files=no", script), "a new module is a difference too: no -uno"
    assert re.search(r"set -\w*e", script) or script.startswith("#!/bin/sh -e"), ".ci/run should stop at the first failure"


def test_readme_opens_with_what_to_type():
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    opening = "\n".join(lines[:30])
    places = [opening.find(command) for command in ("make demo", "make test", "%pip install -c constraints.txt .", "make wheel")]
    assert -1 not in places, "README.md's first 30 lines should have make demo, make test, the %pip line and make wheel"
    assert places[0] < places[1] < places[2], "first make demo, then make test, then what to type on Workbench"


def test_changelog_keeps_a_changelog():
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog") and "keepachangelog.com" in text
    releases = re.findall(r"^## (.*)$", text, re.M)
    assert releases and all(re.match(r"\[(Unreleased|\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d)", r) for r in releases), releases
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds and kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}, kinds
    assert "[Unreleased]" in releases[0] or cfg["version"] in releases[0], "the newest section should be this version's"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "Makefile"])
def test_documents_are_there(name):
    assert (root / name).stat().st_size > 100, f"{name} should say something"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_point_to_what_is_there(name):
    text = (root / name).read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", target)]
    named = re.findall(r"`((?:tools|tests|nbs|w2v2nb)/[\w./]+\.(?:py|ipynb|md|txt|sh))`", text)
    missing = sorted({path for path in linked + named if not (root / path).exists()})
    assert not missing, f"{name} points to {missing}, which aren't there"


def test_make_targets_in_documents_exist():
    targets = set(read_makefile())
    for name in ("README.md", "CONTRIBUTING.md"):
        used = set(re.findall(r"(?:`|^|\n)make ([a-z]+)", (root / name).read_text(encoding="utf-8")))
        assert used <= targets, f"{name} names make targets that don't exist: {sorted(used - targets)}"


# Tracked files


def test_no_tracked_file_is_large(tracked):
    weights = assets / "checkpoint" / "model.safetensors"  # has a limit of its own, below
    large = [f"{p.relative_to(root)} ({p.stat().st_size} bytes)" for p in tracked if p != weights and p.stat().st_size > mib]
    assert not large, f"larger than 1 MB: {large}"


def test_assets_fit():
    total = sum(p.stat().st_size for p in assets.rglob("*") if p.is_file())
    checkpoint = sum(p.stat().st_size for p in (assets / "checkpoint").rglob("*") if p.is_file())
    assert total <= 5 * mib and checkpoint <= 3 * mib, f"assets {total} bytes, checkpoint {checkpoint}"


def test_recordings_are_only_our_own(tracked):
    outside = [str(p.relative_to(root)) for p in tracked if p.suffix.lower() in audio_suffixes and assets not in p.parents]
    assert not outside, f"recordings outside w2v2nb/assets: {outside}; recordings of people never enter the repository"


def test_nothing_pickled_is_tracked(tracked):
    pickled = [str(p.relative_to(root)) for p in tracked if p.suffix.lower() in pickle_suffixes]
    assert not pickled, f"{pickled} can carry code; keep weights as safetensors and tables as CSV or Parquet"


def test_no_word_of_where_this_was_written(tracked):
    needles = ["farm" + "-bench", "farm" + "-studio", "." + "library"]
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(root)}: {needle}" for needle in needles if needle in text]
    assert not found, f"names of the workplace's own tools: {found}"
