"""What records of results hold, by the kind of figure that is drawn from them, and their reader."""

from typing import NamedTuple

from examples.llama.json_file import Field, read_fields, read_json


class Rows(NamedTuple):
    """Objects that a field of a record holds, in a list or by their names.

    Attributes:
      name: of the field.
      type: list or dict.
      fields: of each object.
      least: how many objects there must be.
      required: whether the field must be there.
    """

    name: str
    type: type
    fields: tuple[Field, ...]
    least: int = 0
    required: bool = True

    def check(self, record):
        """Raises a ValueError that names the first field that is not as it should be."""
        field = [Field(self.name, self.type, required=self.required)]
        found = read_fields(record, field).get(self.name)
        if found is None:
            return
        if len(found) < self.least:
            raise ValueError(f"{self.name} is empty")
        for key, row in found.items() if self.type is dict else enumerate(found):
            try:
                read_fields(row, self.fields)
            except ValueError as error:
                raise ValueError(f"{self.name}[{str(key)[:40]}]: {error}") from None


def number(name, *, least=0, required=True):
    """A field of a quantity, which is finite and seldom negative."""
    return Field(name, float, least, 1e30, required=required)


def text(name, *, required=True):
    """A field of text."""
    return Field(name, str, required=required)


_QUALITY = (number("bits_per_byte"), number("bytes"))
_BLOCK = (number("before"), number("after"))
_STAGE = (text("stage"), text("method"), number("density"))  # of a row of compare_refinement
# For each kind the fields of the record itself, and its rows.
KINDS = {
    "spmv": (
        (text("device"),),
        (
            Rows(
                "records",
                list,
                (
                    text("implementation"),
                    text("dtype"),
                    number("batch"),
                    number("rows"),
                    number("cols"),
                    number("density"),
                    number("speedup", required=False),
                ),
            ),
        ),
    ),
    "decode": (
        (text("device"), text("dtype"), number("prompt"), number("batch"), Field("config", dict)),
        (
            Rows(
                "results",
                list,
                (
                    number("density"),
                    number("tokens_per_second"),
                    number("weight_bytes"),
                    number("peak_bytes", required=False),
                ),
                least=1,
            ),
        ),
    ),
    "methods": (
        (Field("dense", dict, required=True), Field("settings", dict, required=True)),
        (
            Rows(
                "rows",
                list,
                (
                    text("method"),
                    *_QUALITY,
                    number("bits", required=False),
                    number("asked_density", required=False),
                    text("values", required=False),
                ),
            ),
        ),
    ),
    "errors": (
        (number("density"),),
        (Rows("layers", list, (text("path"), text("method"), number("error")), least=1),),
    ),
    "refine": (
        (
            Field("losses", list, -1e30, 1e30, items=float),
            Field("held_out", list, items=list),
            Field("settings", dict),
        ),
        (
            Rows("blocks", list, _BLOCK, required=False),
            Rows("refined", dict, _BLOCK, required=False),
            Rows(
                "rows",
                list,
                (
                    *_STAGE,
                    Field("steps_of_a_loss", int, 1, 1e9),
                    Field("losses", list, -1e30, 1e30, items=float),
                ),
                required=False,
            ),
        ),
    ),
    "refinement": (
        (Field("settings", dict, required=True),),
        (
            Rows(
                "rows",
                list,
                (
                    *_STAGE,
                    number("seconds"),
                    Field("perplexity", dict, required=True),
                    Field("agreement", dict, required=True),
                ),
            ),
        ),
    ),
}


def read_record(path, kind):
    """A record of a kind, as it is stored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no record of this kind; the message names the file and the field.
    """
    record = read_json(path)
    fields, rows = KINDS[kind]
    try:
        read_fields(record, fields)
        for each in rows:
            each.check(record)
        if kind == "methods":
            _check_methods(record)
        if kind == "refine":
            _check_refinement(record)
        if kind == "refinement":
            _check_qualities(record)
    except ValueError as error:
        raise ValueError(f"{path} is no record of kind {kind}: {error}") from None
    return record


def merge(records, key_of, known):
    """Records of the same settings as one, which has the last row of each key.

    Args:
      records: what `read_record` gave.
      key_of: gives a row's key, a tuple of names and numbers.
      known: the names that keys may have. Rows are in this order of names, from large numbers on.

    Raises:
      ValueError: the records have other settings, or a row has an unknown name.
    """
    first = records[0]
    for record in records:
        if record["settings"] != first["settings"]:
            raise ValueError(f"other settings: {record['settings']} and {first['settings']}")
    rows = {key_of(row): row for record in records for row in record["rows"]}
    names = {part for key in rows for part in key if isinstance(part, str)}
    if unknown := names - set(known):
        raise ValueError(f"a record has a row of {min(unknown)!r}; known: {', '.join(known)}")
    place = lambda part: known.index(part) if isinstance(part, str) else -part
    return first | {"rows": [rows[key] for key in sorted(rows, key=lambda k: [*map(place, k)])]}


def _check_methods(record):
    """What rows and the dense model must have beside what the table says."""
    read_fields(record["dense"], _QUALITY)
    read_fields(record["settings"], [text("checkpoint")])
    for i, row in enumerate(record["rows"]):
        if not row.get("bits") and not row.get("asked_density"):
            raise ValueError(f"rows[{i}]: it lacks both bits and asked_density")


def _check_refinement(record):
    """That there are blocks, or a loss by step, and points of the held-out loss."""
    read_fields(record.get("settings") or {}, [text("checkpoint", required=False)])
    if record.get("rows") is not None:
        for i, row in enumerate(record["rows"]):
            try:
                Rows("blocks", list, _BLOCK, required=False).check(row)
            except ValueError as error:
                raise ValueError(f"rows[{i}]: {error}") from None
    elif "refined" in record:
        if not all(key.isdecimal() for key in record["refined"] or ["null"]):
            raise ValueError("refined must have the numbers of blocks")
    elif not record.get("blocks") and not record.get("losses"):
        raise ValueError("it lacks losses, and blocks or refined in their place")
    for point in record.get("held_out") or ():
        read_fields(dict(zip(("step", "loss"), point)), [number("step"), number("loss")])


def _check_qualities(record):
    """The perplexities of a row by text, and its agreement with the dense model."""
    for i, row in enumerate(record["rows"]):
        try:
            read_fields(row["perplexity"], [number(name) for name in row["perplexity"]])
            read_fields(row["agreement"], [number("overlap")])
        except ValueError as error:
            raise ValueError(f"rows[{i}]: {error}") from None
