"""YAML from outside: bounded in size and depth, without aliases, so that a small file cannot become a large value."""

from typing import Any

import yaml

from patchsae_ray.errors import UserError, first_line

MAX_BYTES = 2**20
MAX_DEPTH = 100


def load_yaml(name: str, data: bytes) -> Any:
    """The value of a YAML text.

    Args:
        name: of the file, with its flag if it has one, for messages.
        data: its content.

    Raises: UserError where it is no YAML, is larger or deeper than the bounds, or holds aliases.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} is too large for a YAML file of settings: up to 1 MiB would be right")
    depth = 0
    try:
        text = data.decode()
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{name}: values lie more than {MAX_DEPTH} levels deep in each other")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{name}: the alias *{event.anchor}; the value itself would be right")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from error
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise UserError(f"{name}: a value cannot be read ({first_line(error).split(';')[0]})") from error
