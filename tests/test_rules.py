"""Rules by module path, and reports: one base for packing, pruning and factorization."""

import csv
import json

import pytest

import dsf_jax
import macko_jax
from dsf_jax.pipeline.rules import match_rules
from macko_jax.nn import report as reports
from macko_jax.nn.report import LayerReport, PackedLayerReport, PackingReport
from macko_jax.nn.rules import PathRule, Rule, assign_rules

pytestmark = pytest.mark.once

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


@pytest.mark.parametrize("assign", [assign_rules, match_rules])
def test_rules_of_both_packages_match_alike(assign):
    assigned = assign(["layers/0/.*", "head"], PATHS)
    assert assigned["layers/0/up"].path == "layers/0/.*" and assigned["head"].path == "head"
    assert assigned["embed"] is None
    assert assign("head", PATHS)["head"].path == "head"  # and not four rules, a letter each
    with pytest.raises(ValueError, match="'up' matches no layer. A rule has to match a whole path"):
        assign("up", PATHS)
    with pytest.raises(ValueError) as error:
        assign([".*", "decoder/.*"], PATHS)
    assert "'decoder/.*' matches no layer" in str(error.value)
    assert all(path in str(error.value) for path in PATHS)


@pytest.mark.parametrize("rule", [macko_jax.Rule, dsf_jax.Rule])
def test_rules_differ_in_their_own_fields_only(rule):
    assert issubclass(rule, PathRule)
    assert rule("head", True) == rule(path="head", skip=True)
    with pytest.raises(ValueError, match="'layers/.' is not a valid regular expression"):
        rule("layers/[")
    other = {macko_jax.Rule: dsf_jax.Rule, dsf_jax.Rule: macko_jax.Rule}[rule]
    package = rule.__module__.split(".")[0]
    with pytest.raises(TypeError, match=f"A rule is a {package}.Rule or a regular .* not Rule"):
        rule.assign([other("head")], PATHS)


def test_model_without_layers():
    assert assign_rules(None, []) == {}
    with pytest.raises(ValueError, match="the model has none"):
        assign_rules(".*", [])


@pytest.mark.parametrize(
    "options, message",
    [
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


REPORT = PackingReport(
    layers=(
        PackedLayerReport(
            "layers/0/up", "Linear", (2048, 512), 2**19, 2**22, 2_300_000, "delta4", "delta4"
        ),
        PackedLayerReport(
            "head", "Linear", (256, 512), 2**17, 2**19, 2**19, "from density 0.8 on dense is faster"
        ),
    ),
    other_bytes=1000,
    others=(LayerReport("embed", "Embed", (100, 512), 51_200, 204_800, 204_800, "an embedding"),),
)

COMPRESSED = dsf_jax.Report(
    layers=(
        dsf_jax.LayerReport(
            "layers/0/up",
            "linear",
            (2048, 512),
            2**19,
            2**22,
            2**22,
            method="dsf",
            inner=400,
            error=0.0125,
            seconds=200.0,
        ),
    ),
    other_bytes=1000,
    others=(LayerReport("head", "linear", (4, 512), 2048, 8192, 8192, "the output head"),),
    stages=1,
    seconds=201.0,
)


def test_report_totals():
    assert REPORT.bytes_before == 2**22 + 2**19 + 204_800 + 1000
    assert REPORT.bytes_after == 2_300_000 + 2**19 + 204_800 + 1000
    assert REPORT.ratio == REPORT.bytes_after / REPORT.bytes_before
    assert [layer.path for layer in REPORT.packed] == ["layers/0/up"]
    assert REPORT.skipped == {
        "head": "from density 0.8 on dense is faster",
        "embed": "an embedding",
    }
    assert REPORT.layers[0].density == 0.5
    assert REPORT.density == (2**19 + 2**17) / (2**20 + 2**17)
    entries = 2**20 + 2**17 + 51_200
    assert REPORT.model_density == (2**19 + 2**17 + 51_200) / entries
    assert REPORT.dense_share == (2**17 + 51_200) / entries
    assert COMPRESSED.dense_share == 2048 / (2**20 + 2048)


def test_report_prints_a_table():
    lines = str(REPORT).splitlines()
    cells = " ".join(lines[2].split())
    assert cells == "layers/0/up Linear 2048 x 512 0.500 4.19 MB 2.30 MB delta4"
    assert lines[3].endswith("from density 0.8 on dense is faster")
    assert lines[4].split()[:2] == ["embed", "Embed"] and lines[4].endswith("an embedding")
    assert lines[-1].endswith(
        "1 of 2 layers packed, 62% of the bytes of the dense model, 15% of the parameters stay "
        "dense"
    )
    # The columns line up: the numbers of a column end at one place.
    assert lines[2].index("4.19 MB") + 7 == lines[3].index("524.29 kB") + 9


def test_both_packages_print_alike():
    lines = str(COMPRESSED).splitlines()
    assert lines[0].split()[:5] == ["path", "matrix", "method", "density", "inner"]
    assert lines[2].split()[:6] == ["layers/0/up", "2048", "x", "512", "dsf", "0.5000"]
    assert lines[2].endswith("1.25e-02  3 min 20 s")
    assert lines[3].split()[0] == "head" and lines[3].endswith("the output head")
    assert lines[-1].endswith(
        "4.20 MB before, 4.20 MB now with zeros stored: 100% of the bytes of the dense model, 0% "
        "of the parameters stay dense"
    )
    assert isinstance(COMPRESSED, reports.Report) and isinstance(REPORT, reports.Report)


def test_report_of_a_model_without_layers():
    empty = PackingReport((), 8)
    assert "0 of 0 layers packed, 100% of the bytes" in str(empty)
    assert empty.density == empty.dense_share == 0
    assert [row["path"] for row in csv.DictReader(empty.to_csv().splitlines())] == [
        "everything else"
    ]


@pytest.mark.parametrize("report", [REPORT, COMPRESSED], ids=["packed", "compressed"])
def test_report_as_json_and_csv(report):
    record = json.loads(report.to_json())
    assert record == json.loads(json.dumps(report.to_dict()))
    assert record["layers"][0]["density"] == 0.5
    assert record["bytes_after"] == report.bytes_after and record["ratio"] == report.ratio
    assert record["skipped"] == report.skipped
    assert record["others"][0]["note"] == report.others[0].note
    *rows, rest = csv.DictReader(report.to_csv().splitlines())
    assert [row["path"] for row in rows] == [entry.path for entry in report.matrices]
    assert rows[0]["shape"] == "2048 x 512" and float(rows[0]["density"]) == 0.5
    assert sum(int(row["bytes_before"]) for row in (*rows, rest)) == report.bytes_before
    if report is COMPRESSED:
        assert rows[0]["method"] == "dsf" and float(rows[0]["error"]) == 0.0125
    else:
        assert rows[1]["note"].startswith("from density") and rows[0]["encoding"] == "delta4"
