"""YAML without what makes a small file large or ambiguous: aliases, merges, and keys given twice."""

from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which still follows aliases: ten lines of them can stand for 10^11 values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not accepted here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = str(key.value)
            if name in seen:
                problem = f"the key {name[:80]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_mapping(data: bytes) -> Any:
    """The one document in `data`, of plain values.

    Raises:
        yaml.YAMLError: it is not valid, or uses what is left out here.
        ValueError, ArithmeticError, RecursionError: a value that PyYAML cannot make.
    """
    loader = StrictLoader(data.decode("utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
