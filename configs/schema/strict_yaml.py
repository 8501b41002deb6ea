"""Strict YAML: what presets, overrides and resolved configs are written in."""

import re
from typing import Any

import yaml

MOST_LEVELS = 10  # of nested sections and lists
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # what no file name holds: NUL, halves of characters


def parse_yaml(text: str | bytes) -> Any:
    """Raises YAMLError for whatever is wrong."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        raise
    # the constructors behind tags and dates raise nearly anything
    except Exception as error:
        raise yaml.YAMLError(f"not valid YAML ({error})") from error


class Loader(yaml.SafeLoader):
    """YAML whose keys are texts, each given once, and in which 1e-3 is a number as in YAML 1.2.

    Nothing that explodes: no aliases, few levels, whole numbers of 64 bits, texts that can name a file.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="no aliases here, write the value again", problem_mark=mark)
        self.depth += 1
        if self.depth > MOST_LEVELS:
            raise yaml.composer.ComposerError(problem=f"more than {MOST_LEVELS} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if NO_NAME.search(value):
            raise yaml.constructor.ConstructorError(problem="a text that can name no file", problem_mark=node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(problem="a whole number of more than 64 bits", problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes texts that Loader would read as numbers."""


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+$"), list("-+.0123456789")
    )
