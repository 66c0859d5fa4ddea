import json
import re

import measured_reports
import pytest
import report_pages
from lxml import html
from typer.testing import CliRunner

from onnxslim_lab.cli import app
from onnxslim_lab.compare import Comparison, Divergence
from onnxslim_lab.errors import DataError, LabError, ParameterError, one_line
from onnxslim_lab.report import Verdict
from onnxslim_lab.report_page import Sources, charts, read_sources, render

SECTIONS = [
    "summary",
    "change",
    "bytes",
    "layers",
    "sensitivity",
    "latency",
    "gate",
    "coverage",
    "refusals",
    "provenance",
]


def page(sources):
    return html.document_fromstring(render(sources))


def words(element):
    return re.sub(r"\s+", " ", element.text_content()).strip()


def section(tree, name):
    return words(tree.get_element_by_id(name))


def rows(tree, table):
    return [
        [words(cell) for cell in row.iterchildren()]
        for row in tree.get_element_by_id(table).iterfind("tbody/tr")
    ]


def figures(tree):
    return {item["id"]: item for item in json.loads(tree.get_element_by_id("figures").text)}


@pytest.fixture(scope="module")
def full():
    return page(report_pages.full())


def test_every_section_of_a_full_page_is_filled(full):
    for name in SECTIONS[:-1]:
        assert "optimize --report" not in section(full, name)
        assert "given as" not in section(full, name)
    summary = section(full, "summary")
    for text in ("12.50x smaller", "✗ failed", "4 pass, 4 fail, 4 undecided; exit code 13", "✓ faster 0.750"):
        assert text in summary


def test_before_and_after_has_bytes_metric_and_latency(full):
    found = section(full, "change")
    for text in (
        "1.23 MB (1,234,567 bytes)",
        "98.8 kB (98,765 bytes)",
        "-0.005 (95 %: -0.012 to +0.002)",
        "2 ms1.5 ms0.750 times",
    ):
        assert text in found


def test_layers_merge_what_all_steps_did(full):
    found = rows(full, "layer-table")
    assert [row[0] for row in found] == ["conv1 Conv", "conv2 Conv", "conv10 Conv", "fc Conv"]
    head = ["1,000", "300", "90.0%", "4", "7", "0.0123 output error", "20.0", "20.0"]
    assert found[0][1:9] == head
    assert found[0][9] == "prune: zeroed mostshare: sharedencode: written as two"
    assert found[3][1:9] == ["4,000", "400", "60.0%", "4", "", "", "23.0", "29.0"]


def test_the_waterfall_ends_where_the_file_does(full):
    trace = figures(full)["waterfall"]["data"][0]
    assert trace["x"] == [1_234_567, 0, 5_433, -1_142_000, 765, 98_765]
    assert sum(trace["x"][:-1]) == trace["x"][-1]
    assert trace["measure"] == ["absolute", *["relative"] * 4, "total"]
    assert rows(full, "steps")[-1][:2] == ["saving", "+765"]


def test_the_heat_map_is_noise_by_part(full):
    trace = figures(full)["heat-map"]["data"][0]
    assert trace["z"][1] == pytest.approx([-23.0, -40.0, -30.0, None])


def test_refusals_with_one_reason_are_one_row(full):
    assert rows(full, "refusal-table") == [
        ["encode", "too small to pay", "4", "conv1 and 3 moreconv1conv2conv10fc"]
    ]


def test_coverage_says_what_was_not_measured(full):
    assert rows(full, "coverage-table")[2] == ["encode", "75.0%", "not measured"]


@pytest.mark.parametrize(
    ("sources", "absent"),
    [
        (Sources(run=report_pages.run()), {"sensitivity", "latency", "gate"}),
        (Sources(gate=report_pages.gate()), set(SECTIONS) - {"gate"}),
        (Sources(bench=report_pages.bench()), set(SECTIONS) - {"latency"}),
    ],
)
def test_what_is_absent_says_not_measured(sources, absent):
    tree = page(sources)
    for name in absent:
        assert "not measured" in section(tree, name), name
    for name in {"sensitivity", "latency", "gate"} - absent:
        assert "not measured" not in section(tree, name), name


def test_plotly_is_there_only_with_a_chart():
    with_chart, without = render(Sources(run=report_pages.run())), render(Sources(gate=report_pages.gate()))
    assert 1_000_000 < len(with_chart) < 4_000_000
    assert len(without) < 60_000
    assert 'id="plotly"' not in without


def test_a_comparison_names_the_first_difference():
    comparison = Comparison(
        first="a.onnx",
        second="b.onnx",
        data=report_pages.DATA.model_copy(update={"random": True}),
        verdict=Verdict(status="failed", reason="too far"),
        engines=Verdict(status="skipped", reason="no kernel"),
        divergence=Divergence(value="h<b>1", node="n", op_type="Relu", relative=0.5, compared=3),
    )
    tree = page(Sources(comparison=comparison))
    assert words(tree.find(".//h1")) == "b.onnx"
    assert "✗ failed too far" in section(tree, "summary")
    assert "? random test.npz, 200 samples: made up" in section(tree, "summary")
    assert "- not measured no kernel" in section(tree, "summary")


def test_hostile_names_are_text():
    text = render(report_pages.hostile())
    tree = html.document_fromstring(text)
    assert len(tree.findall(".//script")) == 3  # figures, plotly, ours
    assert not [char for char in text if not char.isprintable() and char != "\n"]
    shown = [one_line(name, 1 << 20) for name in report_pages.NASTY]
    names = [row.find("th") for row in tree.get_element_by_id("layer-table").iterfind("tbody/tr")]
    for name, cell in zip(shown, names, strict=True):
        whole = cell.find(".//span[@class='whole']")
        assert (cell.text_content() if whole is None else whole.text).removesuffix(" Conv") == name
    for figure in figures(tree).values():
        labels = figure["layout"]["yaxis"].get("ticktext", [])
        assert not [label for label in labels if "<" in label or len(label) > 60]


def test_nothing_is_fetched(full):
    links = {link for _, _, link, _ in full.iterlinks()}
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    policy = full.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_marks_for_assistive_technology(full):
    for table in full.iterfind(".//table[@class='sortable']"):
        assert words(table.find("caption"))
        for header in table.iterfind("thead/tr/th"):
            assert header.get("aria-sort") == "none"
            assert header.find("button").get("type") == "button"
    for field in full.iterfind(".//input"):
        assert full.xpath(f"//label[@for='{field.get('id')}']")
    identifiers = [element.get("id") for element in full.iterfind(".//*[@id]")]
    assert len(identifiers) == len(set(identifiers))
    assert {link.get("href")[1:] for link in full.iterfind(".//nav//a")} == set(SECTIONS)


def test_labels_are_told_apart():
    names = [f"/a/very/long/folder/block{i}/conv/Conv" for i in range(3)]
    assert charts.told_apart(names) == [f"...block{i}..." for i in range(3)]
    assert charts.told_apart(["a", "b" * 30]) == ["a", "b" * 30]
    assert charts.told_apart([names[0]] * 2) == [names[0]] * 2


def written(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return {name: folder / f"{name}.json" for name in texts}


def test_files_are_known_by_their_keys(tmp_path):
    full = report_pages.full()
    path = written(
        tmp_path,
        run=full.run.to_json(),
        gate=full.gate.to_json(),
        bench=full.bench.model_dump_json(),
        sensitivity=full.sensitivity.model_dump_json(),
    )
    assert read_sources(path["gate"]) == Sources(gate=full.gate)
    read = read_sources(path["run"], gate=path["gate"], bench=path["bench"], sensitivity=path["sensitivity"])
    assert read == full
    with pytest.raises(DataError, match="not JSON as written by bench --json, it is what gate"):
        read_sources(path["run"], bench=path["gate"])
    with pytest.raises(ParameterError, match="already a file of gate"):
        read_sources(path["gate"], gate=path["gate"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ("{}", "not JSON as written by optimize --report, compare"),
        ("[" * 100_000, "is not JSON"),
        ('{"steps": 3, "final": 4}', "written by another version"),
        ("\x80", "is not JSON"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LabError, match=message) as caught:
        read_sources(path)
    assert "\n" not in str(caught.value)


def test_the_command_writes_the_page(tmp_path):
    path = written(tmp_path, gate=report_pages.gate().to_json())["gate"]
    target = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(path), "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert "✗ failed" in section(html.parse(target).getroot(), "summary")
    missing = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "no" / "r.html")])
    assert missing.exit_code
    assert "no such folder" in str(missing.exception)


@pytest.mark.parametrize(
    ("module", "sources"), [("jinja2", Sources()), ("plotly.offline", Sources(run=report_pages.run()))]
)
def test_a_missing_extra_is_named(monkeypatch, module, sources):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    charts.plotly_script.cache_clear()
    with pytest.raises(ParameterError, match=r"pip install 'onnxslim-lab\[report\]'"):
        render(sources)


def test_provenance_is_read_from_the_model(tmp_path):
    from onnx import parser, save

    from onnxslim_lab import optimize

    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    save(parser.parse_model(text), tmp_path / "plain.onnx")
    optimize(tmp_path / "plain.onnx", tmp_path / "small.onnx", allow_growth=True)
    path = written(tmp_path, run=report_pages.run().to_json())["run"]
    found = section(page(read_sources(path, model=tmp_path / "small.onnx")), "provenance")
    assert "SHA-256 of the source" in found
    assert "not measured" not in found
    with pytest.raises(LabError, match="give the file that optimize wrote"):
        read_sources(path, model=tmp_path / "plain.onnx")


@pytest.fixture(scope="module")
def measured(zoo, tmp_path_factory):
    import zoo as models
    from conftest import real

    _, _, images, labels = real(models.mnist)
    return measured_reports.measure(
        tmp_path_factory.mktemp("measured"), zoo("lenet5"), images[:100], labels[:100]
    )


def test_what_the_commands_write_fills_the_page(measured):
    tree = page(measured_reports.sources(measured))
    assert not [place for place in tree.iter() if "not measured" in (place.text or "") and place.tag == "em"]
    budgets = rows(tree, "gate-table")
    assert [row[1].split()[-1] for row in budgets[:2]] == ["fail", "undecided"], "what failed comes first"
    assert budgets[0][0] == "operators"
    summary = section(tree, "summary")
    assert "operator QuantizeLinear" in summary
    assert "more samples" in summary
    layers = rows(tree, "layer-table")
    assert [row[0].split()[0] for row in layers[:4]] == [
        "/conv1/Conv",
        "/conv2/Conv",
        "/fc1/Gemm",
        "/fc2/Gemm",
    ]
    assert {row[4] for row in layers[:4]} == {"8"}, "bits of the codes"
    assert "SHA-256 of the result's weights" in section(tree, "provenance")
    for name in ("comparison", "gate", "bench", "sensitivity"):
        assert section(page(read_sources(measured[name])), "summary")
