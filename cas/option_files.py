"""Options in a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from cas.errors import ConfigError

_YAML_NAMES = {"initialisation": "initialization", "frozen_distractors": "guests"}  # other names of options


def from_yaml(kind: type, file: str) -> dict[str, Any]:
    """{field: value} of a file, each value of the type that the flag takes. Raises: ConfigError with file and key."""
    import yaml

    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--config {file}: needs lines of the form 'option: value'")
    types, values = get_type_hints(kind), dict[str, Any]()
    for key, value in data.items():
        name = str(key).replace("-", "_")
        name = _YAML_NAMES.get(name, name)
        if name not in types:
            raise ConfigError(f"--config {file}: unknown option {key!r}; options are those of --help, with _ or -")
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(types[name], set()))
        assert isinstance(spec, PrimitiveConstructorSpec)
        typed = tuple(value) if isinstance(value, list) else value
        if type(typed) is int and not spec.is_instance(typed):
            typed = str(typed)  # such as a revision of digits
        if not spec.is_instance(typed) or (isinstance(typed, bool) and types[name] is not bool):
            raise ConfigError(f"--config {file}: {key}: {value!r} is not {spec.metavar}")
        values[name] = spec.instance_from_str(spec.str_from_instance(typed))  # 1 is 1.0 where a float is due
    try:
        kind(**values)
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from error
    return values
