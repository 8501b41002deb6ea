"""Strict YAML, for presets, overrides and resolved configs."""

import re
from typing import Any, NoReturn

import yaml

MOST_LEVELS = 10  # of nested sections and lists
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # NUL and lone surrogates, which no file name can hold
NUMBER = re.compile(r"^[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$")  # 1e-3, which YAML 1.1 reads as text


def parse_yaml(text: str | bytes) -> Any:
    """Read YAML. Raises YAMLError for every fault."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        raise
    # constructors of dates and numbers raise almost any error
    except Exception as error:
        raise yaml.YAMLError(f"not valid YAML ({error})") from error


class Loader(yaml.SafeLoader):
    """YAML whose keys are plain words, each given once; without aliases, deep nesting and integers beyond 64 bits."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            refuse("no aliases here, write the value again", mark)
        self.depth += 1
        if self.depth > MOST_LEVELS:
            refuse(f"more than {MOST_LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        keys: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:str":
                refuse("a key must be a plain word", key.start_mark)
            if key.value in keys:
                refuse(f"duplicate key {key.value}", key.start_mark)
            keys.add(key.value)
        if isinstance(node, yaml.ScalarNode):
            if NO_NAME.search(node.value):
                refuse("characters that no file name can hold", mark)
            if node.tag == "tag:yaml.org,2002:int" and abs(self.construct_yaml_int(node)) >= 2**63:
                refuse("a whole number of more than 64 bits", mark)
        return node


def refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.composer.ComposerError(problem=problem, problem_mark=mark)


class Dumper(yaml.SafeDumper):
    """A dumper that quotes texts which Loader would read as numbers."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
