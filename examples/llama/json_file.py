"""JSON files of strangers: a table says what each field may be, and errors name file and field."""

import json
import math
from typing import NamedTuple

from examples.files import read_bytes

MOST_BYTES = 2**26  # of a file of settings; those of the largest models have a few hundred KB

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


class Field(NamedTuple):
    """What one field of a JSON object may be. null counts as absent.

    Attributes:
      name: the field's name.
      type: bool, int, float (which takes integers, too), str, list or dict.
      least, most: the range of a number, or of each of a list's numbers.
      items: the type of a list's elements.
      or_one: whether one such element may stand in the place of the list.
      required: whether the field must be there.
    """

    name: str
    type: type
    least: float = -math.inf
    most: float = math.inf
    items: type | None = None
    or_one: bool = False
    required: bool = False

    def accepts(self, value) -> bool:
        """Whether the value is of the type and in the range."""
        if self.items is not None and (self.or_one or isinstance(value, list)):
            element = self._replace(type=self.items, items=None)
            return all(map(element.accepts, value if isinstance(value, list) else [value]))
        if self.type in (int, float):
            numbers = (int,) if self.type is int else (int, float)
            # A NaN lies in no range.
            return type(value) in numbers and self.least <= value <= self.most
        return type(value) is self.type

    def __str__(self):
        text = _KINDS[self.type]
        if self.items is not None:
            text += f", each {_KINDS[self.items]}"
        if self.least > -math.inf:
            text += f" from {self.least} to {self.most}"
        return text


def read_fields(described, fields):
    """The fields of a JSON object that a table names, each of its type and in its range.

    Args:
      described: what `json.loads` gave.
      fields: a `Field` for each field of interest; others are left out.

    Returns:
      A dict of the fields that are there.

    Raises:
      ValueError: a field is missing, or is not what the table says.
    """
    if not isinstance(described, dict):
        raise ValueError(f"it must be an object, got {_shown(described)}")
    found = {f.name: described[f.name] for f in fields if described.get(f.name) is not None}
    if absent := [f.name for f in fields if f.required and f.name not in found]:
        raise ValueError(f"it lacks {', '.join(absent)}")
    for field in fields:
        if field.name in found and not field.accepts(found[field.name]):
            raise ValueError(f"{field.name} must be {field}, got {_shown(found[field.name])}")
    return found


def read_json(path, fields=None):
    """What a JSON file holds; with a table of fields, those of its object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a regular file of JSON, or a field is not as the table says.
    """
    text = read_bytes(path, MOST_BYTES)
    try:
        found = json.loads(text.decode())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for settings; fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if fields is None:
        return found
    try:
        return read_fields(found, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shown(value):
    """The value as it is written, cut to a length that a sentence bears."""
    text = repr(value) if isinstance(value, (bool, int, float, str)) else _KINDS.get(type(value))
    text = "null" if text is None else text
    return text if len(text) <= 60 else f"{text[:57]}..."
