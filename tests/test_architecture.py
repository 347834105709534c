"""The layers and who may import what, read from the source with `ast`, so that nothing has to run.

A new file of the core needs a line in LAYERS; a new dependency a line in EAGER or INSIDE.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE, KERNELS = "qwen2audio_core", "qwen2audio_kernels"

# A file or folder of the core may import those of a smaller number.
LAYERS = {
    **dict.fromkeys(
        ("config", "errors", "gpu", "holding", "hosts", "install", "ops", "options", "recording"),
        0,
    ),
    **dict.fromkeys(("hub", "reading", "audio", "audio_files", "frontend"), 1),
    **dict.fromkeys(("cache", "linear", "packed_linear", "encoder", "projector", "decoder"), 1),
    "model": 2,
    **dict.fromkeys(
        (
            "weights",
            "saving",
            "quantize",
            "packing",
            "tokenizer",
            "chat",
            "sampling",
            "backends",
            "reuse",
            "rows",
        ),
        3,
    ),
    **dict.fromkeys(("generate", "prefix_cache", "packed_encoder", "slots", "engine", "tiny"), 4),
    **dict.fromkeys(("points", "probe", "layout", "attribution", "word_times"), 4),
    **dict.fromkeys(("assistant", "terminal"), 4),
    **dict.fromkeys(("talk", "transcribe", "compare", "info", "quantize_command", "__init__"), 5),
    **dict.fromkeys(("training", "evaluation", "web", "serving", "inspection"), 5),
    "cli": 6,
    "__main__": 7,
}
# The only imports between neighbours of one layer: (who, whom).
SIDEWAYS = {
    ("config", "errors"),
    ("holding", "errors"),
    ("audio", "audio_files"),
    ("audio", "frontend"),
    ("decoder", "cache"),
    ("decoder", "linear"),
    ("encoder", "linear"),
    ("projector", "linear"),
    ("chat", "tokenizer"),
    ("rows", "chat"),
    ("weights", "sampling"),
    ("weights", "packing"),
    ("weights", "quantize"),
    ("saving", "quantize"),
    ("saving", "weights"),
    ("packing", "quantize"),
    ("quantize", "backends"),
    ("assistant", "generate"),
    ("terminal", "assistant"),
    ("terminal", "tiny"),
    ("assistant", "tiny"),
    ("quantize_command", "info"),
    ("probe", "points"),
    ("attribution", "probe"),
    ("attribution", "points"),
    ("word_times", "probe"),
    ("engine", "generate"),
    ("engine", "prefix_cache"),
    ("engine", "slots"),
    ("slots", "packed_encoder"),
    ("web", "inspection"),
    ("serving", "transcribe"),
    ("evaluation", "transcribe"),
    ("serving", "__init__"),
}
# Third-party packages besides torch: at the top of a file, and only inside a function.
EAGER = {
    "audio": {"numpy"},
    "audio_files": {"numpy"},
    "weights": {"safetensors"},
    "cli": {"typer"},
    "options": {"typer"},
    "serving": {"typer"},
    "inspection": {"typer"},
    "training": {"typer", "safetensors"},
    "evaluation": {"typer", "numpy"},
    "quantize_command": {"typer"},
    "web": {"typer"},
}
INSIDE = {
    "audio": {"soxr", "torchaudio"},
    "audio_files": {"soundfile", "av"},
    "hub": {"huggingface_hub"},
    "tokenizer": {"tokenizers"},
    "backends": {KERNELS},
    "compare": {"rich", "transformers"},
    "info": {"rich"},
    "training": {"matplotlib"},
    "evaluation": {"jiwer", "sacrebleu", "whisper_normalizer", "cn2an", "opencc", "rich"},
    "quantize_command": {"rich"},
    "cli": {"rich"},
    "serving": {"fastapi", "starlette", "uvicorn", "h11", "python_multipart", "prometheus_client"},
    "web": {"gradio", "starlette"},
    "inspection": {"matplotlib", "numpy", "rich"},
}
# Not needed to import the core: the extras, and what only some calls use.
OPTIONAL = (
    "av",
    "matplotlib",
    "torchaudio",
    "transformers",
    "librosa",
    "scipy",
    "triton",
    "soundfile",
    "soxr",
    "rich",
    *("fastapi", "starlette", "uvicorn", "h11", "python_multipart", "prometheus_client"),
    "gradio",
    *("jiwer", "sacrebleu", "whisper_normalizer", "cn2an", "opencc"),
    KERNELS,
)

# What a script's --help must not wait for.
HEAVY = {"transformers", "torchaudio", "librosa", "scipy", "matplotlib", "triton", KERNELS}

MODEL_FILES = ("encoder", "projector", "decoder", "model")
DEVICES = {"cuda", "mps", "cpu"}
STRANGE_TO_A_MODEL = DEVICES | {
    *("triton", "tokenizer", "tokenizers", "open", "Path"),
    *("sampling", "temperature", "top_k", "top_p"),
}
JUNK_DRAWERS = {"utils.py", "common.py", "helpers.py", "misc.py"}


class Import(NamedTuple):
    name: str  # dotted, with the imported name: "torch.nn.functional", "qwen2audio_core.ops.rope"
    line: int
    inside: bool  # in a function or under TYPE_CHECKING, so not run when the file is imported


class _ImportReader(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Import] = []
        self.depth = 0

    def add(self, name: str, node: ast.stmt | ast.expr) -> None:
        self.found.append(Import(name, node.lineno, self.depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.add("." * node.level + ".".join(filter(None, (node.module, alias.name))), node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.add(name.value, node)
        self.generic_visit(node)

    def deeper(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = deeper

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self.deeper(node)
        else:
            self.generic_visit(node)


def read(path: Path) -> tuple[ast.Module, list[Import]]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    reader = _ImportReader()
    reader.visit(tree)
    return tree, reader.found


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name inside the package -> file: "model", "training.lora", "__init__", "training"."""
    named = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        named[".".join(parts)] = path
    return named


def target(name: str, core: dict[str, Path]) -> str:
    """The module of the core that an import of `name` loads; the package's names are __init__'s."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in core:
        parts.pop()
    return ".".join(parts) or "__init__"


def words_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every identifier of a file, and the words of its strings that are not documentation."""
    text = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield node.arg, line
        elif isinstance(node, ast.alias):
            yield from ((part, line) for part in node.name.split("."))
        elif isinstance(node, ast.Constant) and id(node) not in text:
            yield from ((word, line) for word in re.findall(r"\w+", str(node.value)))


def violations(root: Path) -> list[str]:
    """Every breach of the house's import rules in a checkout, one line each."""
    return [*core_violations(root), *kernel_violations(root), *layout_violations(root)]


def core_violations(root: Path) -> Iterator[str]:
    core = modules(root / CORE)
    graph: dict[str, set[str]] = {}
    for module, path in core.items():
        own = module.split(".")[0]
        where = f"{CORE}/{path.relative_to(root / CORE)}"
        if own not in LAYERS:
            yield f"{where}: not in LAYERS of tests/test_architecture.py, give it a layer there"
            continue
        tree, imports = read(path)
        edges = graph.setdefault(module, set())
        for name, line, inside in imports:
            package = name.split(".")[0]
            if not package:
                yield f"{where}:{line}: relative import of {name}, write it out"
            elif package == CORE:
                other = target(name, core)
                edges.add(other)
                theirs = other.split(".")[0]
                allowed = LAYERS.get(theirs, 99) < LAYERS[own] or (own, theirs) in SIDEWAYS
                if theirs != own and not allowed:
                    yield (
                        f"{where}:{line}: layer {LAYERS[own]} imports {theirs}"
                        f" of layer {LAYERS.get(theirs, '?')}"
                    )
            elif package != "torch" and package not in sys.stdlib_module_names:
                if package in EAGER.get(own, ()):
                    continue
                if package not in INSIDE.get(own, ()):
                    yield f"{where}:{line}: may not import {package}"
                elif not inside:
                    yield f"{where}:{line}: may import {package} only inside a function"
        if own in MODEL_FILES:
            for word, line in words_of(tree):
                if word in STRANGE_TO_A_MODEL:
                    yield f"{where}:{line}: a model file names {word!r}"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{CORE}: import cycle {' <- '.join(error.args[1])}"


def kernel_violations(root: Path) -> Iterator[str]:
    known = sys.stdlib_module_names | {"torch", "triton", KERNELS}
    for path in sorted((root / "kernels" / KERNELS).rglob("*.py")):
        for name, line, _ in read(path)[1]:
            if not name.startswith(".") and name.split(".")[0] not in known:
                yield f"kernels/{KERNELS}/{path.name}:{line}: may not import {name}"


def layout_violations(root: Path) -> Iterator[str]:
    if (root / "kernels" / "__init__.py").exists():
        yield "kernels/__init__.py: shadows the package `kernels` that transformers imports"
    for name in ("tests/__init__.py", "tests/kernels"):
        if (root / name).exists():
            yield f"{name}: tests are flat files without a package"
    for folder in (CORE, "kernels", "scripts", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.name in JUNK_DRAWERS:
                yield f"{path.relative_to(root)}: name the file after what it holds"
    for path in sorted((root / "scripts").glob("*.py")):
        tree, imports = read(path)
        for name, line, inside in imports:
            package = name.split(".")[0]
            if not inside and package in HEAVY:
                yield f"scripts/{path.name}:{line}: imports {package} outside a function"
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield f"scripts/{path.name}: has no main(argv=None)"


def test_house_rules() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


SOUND = {
    f"{CORE}/__init__.py": f"from {CORE}.model import Model\n",
    f"{CORE}/errors.py": "class InputError(ValueError): ...\n",
    f"{CORE}/ops.py": "import torch\n",
    f"{CORE}/sampling.py": "",
    f"{CORE}/audio.py": f"import numpy\nfrom {CORE}.errors import InputError\n"
    "def load():\n    import soxr\n    import torchaudio\n",
    f"{CORE}/model.py": f'"""Runs on cuda or cpu."""\nfrom {CORE} import ops\n'
    "def run(x):\n    return x.to(x.device)\n",
    f"{CORE}/cli.py": f"import typer\nfrom {CORE} import audio\n",
    f"{CORE}/training/loop.py": f"from {CORE}.training import data\n",
    f"{CORE}/training/data.py": f"from {CORE} import model\n",
    f"kernels/{KERNELS}/rope.py": "import torch\nimport triton.language as tl\n"
    "from . import _launch\n",
    "scripts/bench.py": "import argparse\ndef main(argv=None):\n    import transformers\n",
}
BREACHES = [
    ("core/new_thing.py", "", "not in LAYERS"),
    ("core/ops.py", "from core import sampling", "layer 0 imports sampling of layer 3"),
    ("core/ops.py", "import core.sampling as s", "layer 0 imports sampling of layer 3"),
    ("core/ops.py", "def f():\n    from core.sampling import choose", "layer 0 imports sampling"),
    ("core/frontend.py", "from core.audio import load", "layer 1 imports audio of layer 1"),
    ("core/audio.py", "from core import load", "layer 1 imports __init__ of layer 5"),
    ("core/web/page.py", "from core.training import loop", "layer 5 imports training"),
    ("core/audio.py", "from . import ops", "relative import"),
    ("core/audio.py", "import soxr", "audio.py:1: may import soxr only inside a function"),
    ("core/audio.py", "def f():\n    import transformers", "may not import transformers"),
    ("core/audio.py", "def f():\n    __import__('librosa')", "may not import librosa"),
    ("core/audio.py", "if True:\n    import torchaudio", "only inside a function"),
    ("core/chat.py", "import tokenizers", "may not import tokenizers"),
    ("core/generate.py", "def f():\n    import kernels_package", "may not import kernels_package"),
    ("core/compare.py", "from transformers import AutoProcessor", "only inside a function"),
    ("core/training/data.py", "from core.training import loop", "import cycle"),
    ("core/decoder.py", "x = y.cuda()", "a model file names 'cuda'"),
    ("core/encoder.py", "def f(x):\n    return x.to('cuda:0')", "a model file names 'cuda'"),
    ("core/model.py", "def f(tokenizer): ...", "a model file names 'tokenizer'"),
    ("core/model.py", "f(temperature=1)", "a model file names 'temperature'"),
    ("kernels/rope.py", "def f():\n    from core import ops", "may not import core.ops"),
    ("kernels/rope.py", "import numpy as np", "may not import numpy"),
    ("kernels/../__init__.py", "", "kernels/__init__.py"),
    ("tests/__init__.py", "", "tests/__init__.py"),
    ("core/training/utils.py", "", "name the file after what it holds"),
    ("scripts/make.py", "import transformers\ndef main(): ...", "make.py:1: imports transformers"),
    ("scripts/make.py", "import argparse", "has no main"),
]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    write_tree(tmp_path, SOUND)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("path", "source", "message"), BREACHES)
def test_each_breach_is_found(path: str, source: str, message: str, tmp_path: Path) -> None:
    folder, _, rest = path.partition("/")
    folder = {"core": CORE, "kernels": f"kernels/{KERNELS}"}.get(folder, folder)
    source, message = (re.sub(r"\bcore\b", CORE, text) for text in (source, message))
    write_tree(tmp_path, {**SOUND, f"{folder}/{rest}": source})
    found = violations(tmp_path)
    assert len(found) == 1 and message in found[0], found


UNIX = ("fcntl", "grp", "pwd", "readline", "resource", "termios")  # Windows has none of them

IMPORT_EACH = """
import sys, traceback
from importlib import import_module
from importlib.machinery import BuiltinImporter, PathFinder

optional, names = (set(text.split(",")) for text in sys.argv[1:])

def without(finder):
    if finder not in (BuiltinImporter, PathFinder):
        return finder
    class Without(finder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            hidden = name.partition(".")[0] in optional
            return None if hidden else super().find_spec(name, path, target)
    return Without

sys.meta_path = [without(finder) for finder in sys.meta_path]
for name in sorted(names):
    try:
        import_module(name)
    except BaseException:
        print(name, traceback.format_exc(limit=-1).splitlines()[-1])
"""


def import_each(names: list[str], optional: tuple[str, ...], folder: Path) -> str:
    """What goes wrong when each module is imported in a process that has no optional package."""
    command = [sys.executable, "-c", IMPORT_EACH, ",".join(optional), ",".join(names)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_the_core_imports_without_the_optional_packages() -> None:
    names = [f"{CORE}.{name}" for name in modules(ROOT / CORE) if name != "__init__"]
    assert len(names) > 10
    assert import_each([CORE, *names], (*OPTIONAL, *UNIX), ROOT) == ""


def test_a_needless_import_is_noticed(tmp_path: Path) -> None:
    write_tree(tmp_path, {"needy.py": "import pytest\n", "modest.py": "import json\n"})
    found = import_each(["needy", "modest"], ("pytest",), tmp_path)
    assert found == "needy ModuleNotFoundError: No module named 'pytest'\n"
