"""From a JSON schema to a regular expression of the JSON texts that it describes, for `response_format`.

Read are type, properties, required, items, minItems, maxItems, enum, const, and additionalProperties false; an object has its properties
in their order. Anything else that would narrow the texts is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dlm.errors import InputError

CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
STRING, INTEGER = f'"{CHARACTER}*"', "-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
PLAIN = {"string": STRING, "integer": INTEGER, "number": NUMBER, "boolean": "(?:true|false)", "null": "null"}
WORDS = ("title", "description", "$schema", "$id", "examples", "default")  # that narrow nothing
MAX_DEPTH, MAX_PARTS = 8, 32
MAX_SIZE = 1500
"""Characters of the expression, those of an item of an array as often as it may stand there: its automaton takes seconds to make."""
OBJECT_DEPTH = 2
"""Of `json_object`: objects and arrays in the object, which a regular expression has to count."""


def any_object() -> str:
    """JSON objects, OBJECT_DEPTH levels deep."""
    value = f"(?:{'|'.join(PLAIN[kind] for kind in ('string', 'number', 'boolean', 'null'))})"
    made = ""
    for _ in range(OBJECT_DEPTH):
        made = rf"\{{{_list(f'{STRING}: ?{value}')}\}}"
        value = rf"(?:{value}|{made}|\[{_list(value)}\])"
    return made


def _list(item: str) -> str:
    """Any number of them."""
    return f"(?:{item}(?:, ?{item})*)?"


def expression(schema: Mapping[str, Any]) -> str:
    """The texts that a schema describes. InputError for a schema that is not read, by the key that is the reason, or too large."""
    return _of(schema, 0, 1)


def _of(schema: Mapping[str, Any], depth: int, times: int) -> str:
    """depth: schemas around it; times: how often its texts may stand in the whole."""
    found = _read(schema, depth, times)
    if len(found) * times > MAX_SIZE:
        raise InputError("the JSON schema is too large: fewer or shorter parts, fewer items of arrays")
    return found


def _read(schema: Mapping[str, Any], depth: int, times: int) -> str:
    if not isinstance(schema, Mapping):
        raise InputError(f"a JSON schema is an object, got {str(schema)[:40]}")
    if depth > MAX_DEPTH:
        raise InputError(f"the JSON schema is more than {MAX_DEPTH} levels deep")
    for key in ("const", "enum"):
        if key in schema:
            _only(schema, (key, "type"))
            return _texts([schema[key]] if key == "const" else schema[key])
    kind = schema.get("type")
    if isinstance(kind, str) and kind in PLAIN:
        _only(schema, ("type",))
        return PLAIN[kind]
    read: dict[Any, Callable[[Mapping[str, Any], int, int], str]] = {"object": _object, "array": _array}
    if not isinstance(kind, str) or kind not in read:
        raise InputError(f"the JSON schema has the type {str(kind)[:40]!r}; read are {', '.join([*PLAIN, *read])}, enum and const")
    return read[kind](schema, depth, times)


def _only(schema: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if strange := [key for key in schema if key not in (*keys, *WORDS)]:
        raise InputError(f"the key {str(strange[0])[:40]!r} of a JSON schema is not read beside {', '.join(keys)}")


def _texts(values: Any) -> str:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_PARTS:
        raise InputError(f"enum of a JSON schema lists 1 to {MAX_PARTS} values")
    return f"(?:{'|'.join(re.escape(json.dumps(value, ensure_ascii=False)) for value in values)})"


def _object(schema: Mapping[str, Any], depth: int, times: int) -> str:
    _only(schema, ("type", "properties", "required", "additionalProperties"))
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not 0 < len(properties) <= MAX_PARTS:
        raise InputError(f"an object of a JSON schema has 1 to {MAX_PARTS} properties")
    if not isinstance(required, list) or not {str(name) for name in required} <= set(properties):
        raise InputError("required of a JSON schema lists names of properties")
    if schema.get("additionalProperties", False) not in (False, True):
        raise InputError("additionalProperties of a JSON schema is not read as a schema: set it to false")
    parts = [rf"{re.escape(json.dumps(name))}: ?{_of(each, depth + 1, times)}" for name, each in properties.items()]
    return rf"\{{{', ?'.join(parts)}\}}"


def _array(schema: Mapping[str, Any], depth: int, times: int) -> str:
    _only(schema, ("type", "items", "minItems", "maxItems"))
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    counts = [count for count in (least, most) if count is not None]
    if not all(isinstance(count, int) and 0 <= count <= MAX_PARTS for count in counts) or (most is not None and most < least):
        raise InputError(f"minItems and maxItems of a JSON schema are whole numbers up to {MAX_PARTS}, in that order")
    item = _of(schema.get("items", {}), depth + 1, times * max(1, least, most or 0))
    if most == 0:
        return r"\[\]"
    more = f"(?:, ?{item}){{{max(0, least - 1)},{'' if most is None else most - 1}}}"
    return rf"\[{item}{more}\]" if least else rf"\[(?:{item}{more})?\]"
