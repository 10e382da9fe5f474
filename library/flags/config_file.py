"""`--config_file` and `--output_config`: settings read from and written to TOML."""

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

import toml

from library.flags.command_line import CommandLine, Reading, words_for
from library.flags.declare import flag
from library.flags.elsewhere import SCRIPTS_WITH


@dataclass(frozen=True)
class ConfigFileFlags:
    """Settings in a file"""

    config_file: str | None = flag(None, "TOML file with settings; .toml may be left out, the command line wins")
    output_config: bool = flag(False, "write the settings that differ from the defaults to config_file and stop")


# Notes that programs writing such files leave in them for themselves; no script ever read them.
NOTES = ("epoch", "noise_offset_type")
# Values written for "not used" that the flag itself does not know.
UNUSED = {"dynamo_backend": "no"}
# Keys that are arguments of the network.
NETWORK_ARGS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
NOT_WRITTEN = ("config_file", "output_config", "wandb_api_key")

PATHS_IN_TOML = "in TOML a path with \\ stands in 'single quotes'"
# What is left of C:\train or D:\new in double quotes, where \t and \n are a tab and a line break.
BROKEN_PATH = re.compile(r"[A-Za-z]:[\b\t\n\f\r]")


def config_path(name: str) -> Path:
    """The file that `--config_file name` means."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config_file(path: Path, command_line: CommandLine) -> Reading:
    """The settings in `path`, checked like flags; tables are flattened, and only their keys count."""
    reading = Reading()
    try:
        content = toml.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        reading.errors.append(f"--config_file: there is no file {path}")
        return reading
    except UnicodeDecodeError as error:
        reading.errors.append(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
        return reading
    except (OSError, toml.TomlDecodeError, IndexError) as error:
        hint = f"; {PATHS_IN_TOML}" if "escape" in str(error) else ""
        reading.errors.append(f"{path} cannot be read as TOML: {error}{hint}")
        return reading
    for key, value in _flatten(content, path, reading.warnings).items():
        if key in NOTES or UNUSED.get(key) == value:
            continue
        if key not in command_line.flags:
            if key in SCRIPTS_WITH and value in ("", False, []):
                continue  # one file may be for several scripts: what is off in it asks nothing of this one
            cure = f"{key} is not a flag; it belongs in network_args, as '{key}={value}'"
            reading.errors.append(f"{path}: {cure if key in NETWORK_ARGS else command_line.unknown(key, key)}")
            continue
        try:
            _refuse_broken_paths(value)
            words = words_for(command_line.flags[key], value)
            reading.values.update(command_line.read_flag(words) if words else {})
        except ValueError as error:
            reading.failed.add(key)
            reading.errors.append(f"{path}: {key}: {str(error).removeprefix(f'--{key}: ')}")
    return reading


def write_config_file(
    path: Path, given: Mapping[str, Any], flags: Mapping[str, Field[Any]], defaults: Mapping[str, Any]
) -> None:
    """Write the given settings that differ from their defaults; FileExistsError when `path` is there already."""
    if path.exists():
        raise FileExistsError(f"--output_config: {path} exists and is not overwritten; choose another --config_file")
    content = {
        name: _as_toml(given[name])
        for name, declared in flags.items()
        if name in given and name not in NOT_WRITTEN and given[name] != defaults.get(name, declared.default)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml.dumps(content), encoding="utf-8")


def _flatten(content: Mapping[str, Any], path: Path, warnings: list[str]) -> dict[str, Any]:
    """Keys of the file and of its tables in one mapping; the last of several equal keys wins."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) else {name: value}
        for key in inner.keys() & flat.keys():
            place = f"in [{name}]" if isinstance(value, dict) else "outside of tables"
            warnings.append(f"{path}: {key} stands there twice; the one {place} is used")
        flat.update(inner)
    return flat


def _refuse_broken_paths(value: Any) -> None:
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and BROKEN_PATH.match(part):
            raise ValueError(f"{part!r} is no path: {PATHS_IN_TOML}")


def _as_toml(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
