"""Rules by module path, and the report."""

import json

import pytest

from macko_jax.nn.rules import LayerReport, Report, Rule, assign_rules

PATHS = ["embed", "layers/0/up", "layers/0/down", "layers/1/up", "layers/1/down", "head"]


def test_first_matching_rule_applies():
    first = Rule(r"layers/0/.*", dtype="bfloat16")
    second = Rule(r".*/up", max_density=0.5)
    assigned = assign_rules([first, second, "head"], PATHS)
    assert assigned["layers/0/up"] is first
    assert assigned["layers/1/up"] is second
    assert assigned["head"] == Rule("head")
    assert assigned["embed"] is None and assigned["layers/1/down"] is None


def test_one_rule_needs_no_list():
    assert assign_rules("head", PATHS)["head"] == Rule("head")
    assert assign_rules(Rule("head"), PATHS)["head"] == Rule("head")
    assert set(assign_rules(None, PATHS).values()) == {Rule()}


def test_a_rule_matches_the_whole_path():
    with pytest.raises(ValueError, match="'up' matches no layer"):
        assign_rules("up", PATHS)


def test_unmatched_rule_lists_the_paths():
    with pytest.raises(ValueError) as error:
        assign_rules([Rule(".*"), Rule("decoder/.*")], PATHS)
    assert "'decoder/.*' matches no layer" in str(error.value)
    assert all(path in str(error.value) for path in PATHS)


def test_model_without_layers():
    assert assign_rules(None, []) == {}
    with pytest.raises(ValueError, match="the model has none"):
        assign_rules(".*", [])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(path="layers/["), "not a valid regular expression"),
        (dict(max_density=80), "between 0 and 1"),
        (dict(dtype="int4"), "float16, bfloat16, float32, int8, float8_e4m3fn"),
    ],
)
def test_invalid_rule(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**options)


def test_rule_of_another_type():
    with pytest.raises(TypeError, match="not 3"):
        assign_rules(["head", 3], PATHS)


REPORT = Report(
    layers=(
        LayerReport("layers/0/up", "Linear", (512, 2048), 0.5, 4_194_304, 2_300_000, "bitmask"),
        LayerReport(
            "head",
            "Linear",
            (512, 256),
            1.0,
            524_288,
            524_288,
            skipped="from density 0.8 on dense is faster",
        ),
    ),
    other_bytes=1000,
)


def test_report_totals():
    assert REPORT.bytes_before == 4_194_304 + 524_288 + 1000
    assert REPORT.bytes_after == 2_300_000 + 524_288 + 1000
    assert [layer.path for layer in REPORT.packed] == ["layers/0/up"]
    assert [layer.path for layer in REPORT.skipped] == ["head"]


def test_report_prints_a_table():
    lines = str(REPORT).splitlines()
    assert lines[2].split() == [
        "layers/0/up",
        "Linear",
        "512",
        "x",
        "2048",
        "0.500",
        "4.19",
        "MB",
        "2.30",
        "MB",
        "bitmask",
    ]
    assert lines[3].endswith("skipped: from density 0.8 on dense is faster")
    assert lines[-1].endswith("1 of 2 layers packed, 60% of the bytes")
    # The columns line up: the numbers of a column end at one place.
    assert lines[2].index("4.19 MB") + 7 == lines[3].index("524.29 kB") + 9


def test_report_as_json():
    record = json.loads(REPORT.to_json())
    assert record == json.loads(json.dumps(REPORT.to_dict()))
    assert record["layers"][0]["density"] == 0.5
    assert record["layers"][1]["skipped"].startswith("from density")
    assert record["bytes_after"] == REPORT.bytes_after
