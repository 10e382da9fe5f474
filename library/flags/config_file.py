"""`--config_file` and `--output_config`: settings read from and written to TOML."""

from dataclasses import dataclass

from library.flags.declare import flag


@dataclass(frozen=True)
class ConfigFileFlags:
    """Settings in a file"""

    config_file: str | None = flag(None, "TOML file with settings; .toml may be left out, the command line wins")
    output_config: bool = flag(False, "write the settings that differ from the defaults to config_file and stop")
    strict: bool = flag(False, "a flag that has no effect with the chosen model is an error, not a warning")
