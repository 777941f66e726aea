"""Reading a config file: safe YAML without its traps.

PyYAML's SafeLoader alone would take the last of two equal keys, unfold aliases without end, and read 010 as 8, 1:30 as
90 and 2026-01-01 as a date.
"""

import os
import re
from pathlib import Path

import yaml

from model.errors import InputError, shown
from model.training.settings import ESCAPES, SECTIONS, Settings, build_settings

WIDE_COLON = re.compile(r"^\s*\w+：", re.MULTILINE)  # behind a key, as a Chinese keyboard types it
MAX_CONFIG_BYTES = 1 << 16  # a config file is a page of text; anything larger is another file
DEEPEST = 16  # lists and mappings within each other; two are of use


def load_settings(config: str | Path | None = None, **values) -> Settings:
    """The settings of a config file, and over them those given by name, as flags of `train.py` are.

    Args:
        config: the file; None: the defaults.
        values: of any section: `load_settings("config_chat.yaml", epochs=10, out_dir="out_mine")`.

    Raises:
        InputError: with one line for each thing that is wrong.
    """
    return build_settings({} if config is None else read_config(config), values, config or "config", prefix="")


def read_config(path: str | Path) -> dict:
    """Read a config file into its sections.

    Raises:
        InputError: the file is missing, not a plain file, not UTF-8, not YAML, or not a mapping.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a pipe would be waited for, a device read without end
        found = "is no plain file" if os.path.exists(path) else "there is no such file that may be read"
        raise InputError(f"--config: {path}: {found}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"--config: {path} cannot be read ({error.strerror})") from error
    if len(content) > MAX_CONFIG_BYTES:
        size = path.stat().st_size
        raise InputError(f"--config: {path} has {size:,} bytes, a config file at most {MAX_CONFIG_BYTES:,}")
    try:
        values = yaml.load(content.decode("utf-8"), _StrictLoader)  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"--config: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except yaml.reader.ReaderError as error:
        found = f"the character U+{error.character:04X} at position {error.position}"
        raise InputError(f"--config: {path}: {found} is not allowed in YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        in_quotes = getattr(error, "context", None) == "while scanning a double-quoted scalar"
        hint = f"; {ESCAPES}" if in_quotes and "escape" in str(error.problem) else ""
        if mark and (typed := WIDE_COLON.search(content.decode("utf-8"))):
            hint = f"; {typed[0].strip()} has a full-width colon, where YAML needs one of ASCII and a space"
        raise InputError(f"--config: {path}{where}: {getattr(error, 'problem', None) or 'not YAML'}{hint}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config: {path} holds {type(values).__name__}, expected the sections {', '.join(SECTIONS)}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys, merged keys, aliases and tags, and keeps as text what would become a date
    or a number to base 60 (1:30), 16 (0x10) or 8 (010)."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent):
            raise _refusal("aliases (*name) are not accepted", event)
        if event.tag is not None:
            raise _refusal("tags (!name) are not accepted", event)
        if self.depth > DEEPEST:
            raise _refusal("nested too deeply; a section's keys and values expected", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.nodes.ScalarNode):
                raise _refusal("a key is a list or a mapping, expected a name", key_node)
            key = self.construct_object(key_node)
            if key in seen:
                raise _refusal(f"{shown(key)} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, found) -> yaml.constructor.ConstructorError:
    """An error at the place where an event or a node begins."""
    return yaml.constructor.ConstructorError(None, None, problem, found.start_mark)


# Numbers as JSON writes them. Other forms (3e-4, 1_000) stay text, which `parse_value` reads.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,17})$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]{1,18}\.[0-9]{0,18}(?:[eE][-+]?[0-9]{1,3})?$"),
    list("-+0123456789"),
)
