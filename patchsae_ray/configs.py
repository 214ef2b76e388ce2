"""What has a name: the YAML files of configs/datasets and configs/models."""

import os
from pathlib import Path
from typing import Any

from patchsae_ray.errors import UserError, nearest
from patchsae_ray.yamls import load_yaml

_PACKAGE = Path(__file__).parent
_SCHEME = "package:"


def folders(kind: str) -> list[Path]:
    """Where configs of a kind are looked for, the first hit wins: $PATCHSAE_CONFIGS, the checkout's, the wheel's."""
    own = os.environ.get("PATCHSAE_CONFIGS")
    roots = [Path(own)] if own else []
    return [root / kind for root in (*roots, _PACKAGE.parent / "configs", _PACKAGE / "_configs") if (root / kind).is_dir()]


def names(kind: str) -> list[str]:
    """All names of a kind, sorted."""
    return sorted({path.stem for folder in folders(kind) for path in folder.glob("*.yaml")})


def find(kind: str, name: str, allowed: frozenset[str], required: frozenset[str]) -> dict[str, Any] | None:
    """The config of a name, or None where there is none. Values that begin with `package:` become paths in the package.

    Raises: UserError that names the file and key where a key is unknown or a required one is missing.
    """
    for folder in folders(kind):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return _read(path, allowed, required)
    return None


def _read(path: Path, allowed: frozenset[str], required: frozenset[str]) -> dict[str, Any]:
    config = load_yaml(str(path), path.read_bytes())
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping of {', '.join(sorted(allowed))}")
    for key in config:
        if key not in allowed:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), allowed)}")
    if missing := sorted(required - set(config)):
        raise UserError(f"{path}: {', '.join(missing)} missing")
    for key, value in config.items():
        _check_kind(path, key, value)
    return {key: _in_package(value) for key, value in config.items()}


def _check_kind(path: Path, key: str, value: Any) -> None:
    """Raises: UserError where a value is not of the kind that its key takes: text, or a mapping from text."""
    wanted = {"splits": "a mapping of texts to texts", "train_defaults": "a mapping of settings"}.get(key, "text")
    if wanted == "text":
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        fits = fits and (key != "splits" or all(isinstance(one, str) for one in value.values()))
    if not fits:
        raise UserError(f"{path}: {key} is {value!r}; {wanted} would be right")


def _in_package(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_SCHEME):
        return str(_PACKAGE / value.removeprefix(_SCHEME))
    return value
