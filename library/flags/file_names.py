"""Names that files can have on every system, since they are carried from one to another."""

import re

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)
LONGEST = 200
"""Bytes, so that what is added to the name (`-step00001000-state`) has room within the usual 255."""


def plain_name(name: str | None) -> str | None:
    """`name`, which files begin with; ValueError says why it cannot be one."""
    if name is None:
        return None
    if found := _FORBIDDEN.search(name):
        cure = "folders belong into --output_dir" if found[0] in "/\\" else "leave it out"
        raise ValueError(f"{name!r} holds {found[0]!r}, which names of files cannot have everywhere; {cure}")
    if name != name.strip() or name.endswith("."):
        raise ValueError(f"{name!r} begins or ends with a blank, or ends with a dot, which Windows drops; leave it out")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"{name!r} is the name of a device on Windows; choose another")
    if (length := len(name.encode("utf-8", "surrogatepass"))) > LONGEST:
        raise ValueError(f"it is {length} bytes long, and at most {LONGEST} leave room for what is added; shorten it")
    return name
