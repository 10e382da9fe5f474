"""The rules of the house that a machine can check: who may import whom, and how long a thing may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "library/flags": set(),
    "library/files": set(),
    "library/memory": set(),
    "library/diffusion": {"library/flags"},
    "library/data": {"library/flags", "library/files"},
    "library/models": {"library/flags", "library/files", "library/diffusion"},
    "library/generation": {"library/memory", "library/diffusion", "library/models"},
    "library/train": {
        "library/flags",
        "library/files",
        "library/memory",
        "library/diffusion",
        "library/data",
        "library/models",
        "library/generation",
    },
    "networks": {"library/files"},
    "tools": {"library/flags", "library/files", "library/data", "library/models", "networks"},
}
"""Folder -> the folders it may reach besides itself."""

IMPORT_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("tools/compare_lora.py", "library/generation"): "it makes pictures, as the inference scripts at the top do",
    ("tools/cache_latents.py", "library/train"): "it fills the caches as the trainer does",
    ("tools/cache_text_encoder_outputs.py", "library/train"): "it fills the caches as the trainer does",
    ("tools/prepare_buckets_latents.py", "library/train"): "it fills the caches as the trainer does",
    ("tools/step_counts.py", "library/memory"): "it counts as the plan of activations does",
    ("tools/step_counts.py", "library/train"): "it counts as the estimate of memory does",
    ("tools/full_counts.py", "library/memory"): "it counts what the memory room does to blocks",
    ("tools/bench_full.py", "library/memory"): "it names what the memory room does to blocks",
    ("tools/gpu_run.py", "library/memory"): "it measures what the memory room does to blocks",
    ("tools/made_up_run.py", "library/memory"): "the benchmarks measure the steps of the real trainer",
    ("tools/made_up_run.py", "library/train"): "the benchmarks measure the steps of the real trainer",
    ("tools/made_up_run.py", "library/diffusion"): "the random draws of such a step",
    ("tools/small_run.py", "library/train"): "the benchmarks measure the steps of the real trainer",
    ("tools/small_run.py", "library/diffusion"): "the random draws of such a step",
    ("tools/show_timesteps.py", "library/diffusion"): "it shows what the process of a training draws",
}
"""(file, imported folder) -> why."""

FILE_LINES, FUNCTION_LINES = 400, 60
LENGTH_EXCEPTIONS: dict[str, str] = {}
"""`file` or `file:function` -> why it is longer."""

OPTIONAL_PACKAGES = {
    "anime_face_detector", "bitsandbytes", "dadaptation", "flash_attn", "lion_pytorch", "lycoris", "prodigyopt",
    "pytorch_optimizer", "sageattention", "schedulefree", "wandb", "xformers",
}  # fmt: skip
"""Heavy packages that only some runs need; they alone may be imported inside a function."""

ENTRY_LINES = {"train_network.py": 60, ".py": 150}
"""End of an entry script's name -> its longest length; the first row that fits holds."""

SHARED_MODEL_FOLDERS = {"text", "vae"}
FOREIGN_PATHS = ("/" + "work/", "../" + "shared")
"""Traces of the machine on which a file was written."""


def test_imports_point_down() -> None:
    faults = [
        f"{name}:{line} imports {module}"
        for name, tree in sources()
        for line, module in imports(tree)
        if (target := home(module.replace(".", "/")))
        and target != home(name)
        and target not in reachable(name, tree)
        and (name, target) not in IMPORT_EXCEPTIONS
    ]
    assert not faults, "\n".join(faults)


def test_families_do_not_meet() -> None:
    faults = []
    for name, tree in sources("library/models"):
        family = Path(name).relative_to("library/models").parts[0]
        for line, module in imports(tree):
            parts = module.split(".")
            if parts[:2] != ["library", "models"] or not (ROOT / "library/models" / parts[2]).is_dir():
                continue
            if parts[2] not in SHARED_MODEL_FOLDERS | {family}:
                faults.append(f"{name}:{line} imports {module}")
    assert not faults, "\n".join(faults)


def test_scripts_are_never_imported() -> None:
    # A file in networks/ or tools/ that runs by itself is a script; so is every file at the top.
    scripts = {Path(name).with_suffix("").as_posix().replace("/", ".") for name, tree in sources() if runs(tree)}
    scripts |= {path.stem for path in ROOT.glob("*.py")}
    tools = {script.removeprefix("tools."): script for script in scripts if script.startswith("tools.")}
    faults = [
        f"{name}:{line} imports {module}"
        for name, tree in sources()
        for line, module in imports(tree)
        if any(module == script or module.startswith(script + ".") for script in scripts)
        or (name.startswith("tools/") and module.split(".")[0] in tools)
    ]
    assert not faults, "\n".join(faults)


def test_imports_stand_at_the_top() -> None:
    faults = [
        f"{name}:{line} imports {module} inside {function.name}"
        for name, tree in sources()
        for function in functions(tree)
        for line, module in imports(function)
        if module.split(".")[0] not in OPTIONAL_PACKAGES
    ]
    assert not faults, "\n".join(sorted(set(faults)))


def test_optional_packages_are_not_imported_at_the_top() -> None:
    faults = [
        f"{name}:{line} imports {module}"
        for name, tree in sources()
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for line, module in imports(node)
        if module.split(".")[0] in OPTIONAL_PACKAGES
    ]
    assert not faults, "\n".join(faults)


def test_settings_are_read_without_torch() -> None:
    # `--help` and a mistake in the settings must not cost the import of torch.
    faults = [
        f"{name}:{line} imports {module}"
        for name, tree in sources("library/flags")
        for line, module in imports(tree)
        if module.split(".")[0] not in sys.stdlib_module_names | {"toml", "library"}
    ]
    assert not faults, "\n".join(faults)


def test_nothing_is_too_long() -> None:
    faults = []
    for name, tree in sources():
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        if lines >= FILE_LINES and name not in LENGTH_EXCEPTIONS:
            faults.append(f"{name}: {lines} lines")
        for function in functions(tree):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length >= FUNCTION_LINES and f"{name}:{function.name}" not in LENGTH_EXCEPTIONS:
                faults.append(f"{name}:{function.lineno} {function.name}: {length} lines")
    assert not faults, "\n".join(faults)


def test_entry_scripts_are_short() -> None:
    faults = []
    for path in sorted(ROOT.glob("*.py")):
        limit = next(lines for end, lines in ENTRY_LINES.items() if path.name.endswith(end))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > limit:
            faults.append(f"{path.name}: {lines} lines, at most {limit}")
    assert not faults, "\n".join(faults)


def test_every_file_says_which_question_it_answers() -> None:
    faults = [name for name, tree in sources() if tree.body and not ast.get_docstring(tree)]
    assert not faults, "no docstring: " + ", ".join(faults)


def test_package_files_are_empty() -> None:
    faults = [name for name, tree in sources() if name.endswith("__init__.py") and tree.body]
    assert not faults, ", ".join(faults)


def test_no_file_is_a_drawer_for_everything() -> None:
    faults = [name for name, _ in sources() if Path(name).stem in {"utils", "util", "common", "helpers", "misc"}]
    assert not faults, ", ".join(faults)


def test_the_library_does_not_print_or_exit() -> None:
    faults = [
        f"{name}:{node.lineno} calls {node.func.id}"
        for name, tree in sources("library", "networks/core")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "exit", "quit"}
    ]
    assert not faults, "\n".join(faults)


def test_no_except_catches_everything_unnamed() -> None:
    faults = [
        f"{name}:{node.lineno}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not faults, "\n".join(faults)


def test_nothing_is_left_unfinished() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "Not" + "ImplementedError")
    faults = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {word}"
        for path in project_files("library", "networks", "tools")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in words
        if word in line
    ]
    assert not faults, "\n".join(faults)


def test_no_path_of_another_machine_is_left() -> None:
    faults = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {word}"
        for path in project_files("library", "networks", "tools", "tests", "docs")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in FOREIGN_PATHS
        if word in line
    ]
    assert not faults, "\n".join(faults)


def test_text_files_are_opened_as_utf_8() -> None:
    faults = [
        f"{name}:{node.lineno} {node.func.attr}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"read_text", "write_text"}
        and not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert not faults, "\n".join(faults)


def test_exceptions_are_still_needed() -> None:
    files = {name for name, _ in sources()}
    named = {name for name, _ in IMPORT_EXCEPTIONS}
    named |= {entry.split(":")[0] for entry in LENGTH_EXCEPTIONS}
    assert named <= files, sorted(named - files)


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file under the folders (all of them if none is named) and its syntax tree."""
    for folder in folders or ("library", "networks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), parsed(path)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def reachable(name: str, tree: ast.Module) -> set[str]:
    """The rooms that a file may import from besides its own; a script in networks/ reads flags as well."""
    room = home(name)
    assert room is not None, f"{name} lies in no room of MAY_IMPORT"
    script_rooms = {"library/flags"} if room == "networks" and runs(tree) else set()
    return MAY_IMPORT[room] | script_rooms


def project_files(*folders: str) -> Iterator[Path]:
    """The text files of the project: those of the folders and those at the top."""
    ends = {".py", ".md", ".toml", ".txt", ".yaml", ".json"}
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in ends)
    yield from (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in ends)


def home(path: str) -> str | None:
    """The room that a file or module path lies in."""
    rooms = [room for room in MAY_IMPORT if path == room or path.startswith(room + "/")]
    return max(rooms, key=len, default=None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported; what only a type checker reads counts as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def runs(tree: ast.Module) -> bool:
    """Whether the file has an `if __name__ == "__main__"`."""
    return any(
        isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == "__name__"
        for node in tree.body
    )
