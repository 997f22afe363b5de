"""The command line as a user meets it: on the model that ships, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerlake.catalog.sites import SITES
from layerlake.cli import main
from layerlake.demo.tour import demo_model_path, next_commands

MODEL = str(demo_model_path("stdlib-gpt2"))
TEXT = "\n\n".join(f"def function_{i}(self, value):\n    return self.value + {i} * value" for i in range(40))


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def layerlake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run ``layerlake ARGUMENTS`` in a temporary folder that holds ``text.txt``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with a small run of the shipped model, made by the command line once."""
    folder = tmp_path_factory.mktemp("captured")
    (folder / "text.txt").write_text(TEXT)
    main(["capture", str(folder / "lake"), "--model", MODEL, "--dataset", str(folder / "text.txt")])
    return folder / "lake"


@pytest.fixture
def lake(captured: Path, tmp_path: Path) -> str:
    """A copy of that lake, free to be written to."""
    shutil.copytree(captured, tmp_path / "lake")
    return "lake"


def test_plan_writes_nothing_and_predicts_the_capture(layerlake: Callable[..., Result]) -> None:
    options = ("lake", "--model", MODEL, "--dataset", "text.txt", "--max-tokens", "500", "--json")
    planned = layerlake("plan", *options)
    assert planned.code == 0
    assert not Path("lake").exists()
    numbers = json.loads(planned.out)
    assert numbers["tokens"] <= 500
    assert [site["site"] for site in numbers["sites"]] == list(SITES)

    done = layerlake("capture", *options)
    assert done.code == 0
    found = json.loads(done.out)
    del found["predicted"]["free_nbytes"], numbers["free_nbytes"]
    assert found["predicted"] == numbers
    assert found["actual"]["run"] == numbers["run"]
    for name in ("tokens", "objects"):
        assert found["actual"][name] == numbers[name]
    arrays = sum(site["nbytes"] for site in numbers["sites"] if site["shards"])
    assert arrays < found["actual"]["nbytes"] < arrays + 2 * (numbers["nbytes"] - arrays) + 8192

    again = layerlake("capture", *options)
    assert "holds all of this already" in again.err


def test_ls_and_info_describe_the_run(layerlake: Callable[..., Result], lake: str) -> None:
    (row,) = json.loads(layerlake("ls", lake, "--json").out)
    (described,) = json.loads(layerlake("info", lake, "--json").out)
    assert row["run"] == described["run"]
    assert described["documents"] == 40
    bands = described["sites"][-1]
    assert (bands["site"], bands["first_object"]) == ("attn_band", "attn_band/part-00000000.parquet")
    assert bands["shape"].startswith("40×8×")
    assert described["captures"][0]["self_check"]["padded = unpadded"] < 1e-4
    assert row["run"] in layerlake("ls", lake).out
    assert "padded = unpadded" in layerlake("info", lake).err


def test_sql_prints_a_table_csv_and_json(layerlake: Callable[..., Result], lake: str) -> None:
    query = "SELECT count(*) AS n FROM tokens"
    (row,) = json.loads(layerlake("sql", lake, query, "--format", "json").out)
    assert layerlake("sql", lake, query, "--format", "csv").out.split() == ["n", str(row["n"])]
    assert str(row["n"]) in layerlake("sql", lake, query).out.replace(",", "")


def test_analyze_one_and_all_then_report(layerlake: Callable[..., Result], lake: str) -> None:
    lens = json.loads(layerlake("analyze", lake, "lens", "--scheduler", "synchronous", "--json").out)
    assert {row["boundary"] for row in lens} == set(range(9))
    everything = layerlake("analyze", lake, "all")
    assert everything.code == 0, everything.err
    assert "attention_locality" in everything.out
    assert layerlake("report", lake, "-o", "report.html").code == 0
    assert "vega" in Path("report.html").read_text()


def test_the_commands_that_the_demo_prints_name_what_is_there() -> None:
    commands = next_commands(Path("demo-lake"), Path("demo-report.html"))
    assert len(commands) == 3
    assert any("demo-text.jsonl" in command for command in commands)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ls", "nowhere"], "does not exist"),
        (["ls", "."], "is not a lake"),
        (["captur", "lake"], "Did you mean 'capture'?"),
        (["plan", "--model", "./no-model", "--dataset", "text.txt"], "does not exist"),
        (["plan", "--model", MODEL, "--dataset", "no.txt"], "does not exist"),
        (
            ["plan", "--model", MODEL, "--dataset", "text.txt", "--sites", "mlp_pots"],
            "Did you mean 'mlp_post'?",
        ),
        (["plan", "--model", MODEL, "--dataset", "text.txt", "--text-column", "body"], "it has text"),
        (["plan", "--model", MODEL, "--dataset", "text.txt", "--context", "9999"], "9999"),
        (["plan", "--model", MODEL, "--dataset", "text.txt", "--max-tokens", "many"], "is not a count"),
        (["plan", "--model", MODEL, "--dataset", "text.txt", "--dtype", "int8"], "int8"),
    ],
)
def test_mistakes_get_one_clear_error_and_exit_2(
    layerlake: Callable[..., Result], arguments: list[str], expected: str
) -> None:
    result = layerlake(*arguments)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert expected in result.err
    assert "Traceback" not in result.err
    assert not Path("lake").exists()


def test_sql_mistakes_carry_duckdb_s_words(layerlake: Callable[..., Result], lake: str) -> None:
    wrong = layerlake("sql", lake, "SELECT txt FROM tokens")
    assert wrong.code == 2
    assert "txt" in wrong.err
    assert "Traceback" not in wrong.err
    assert layerlake("sql", lake, "CREATE TABLE t (a INT)").code == 2
    assert layerlake("sql", lake, "EXPLAIN ANALYZE CREATE TABLE t (a INT)").code == 2


def test_a_newer_lake_is_refused(layerlake: Callable[..., Result], lake: str) -> None:
    Path(lake, "layerlake.json").write_text('{"format": "layerlake", "format_version": 99}')
    result = layerlake("ls", lake)
    assert result.code == 2
    assert "99" in result.err
    assert "Upgrade" in result.err


def test_an_unknown_run_is_named_with_the_known_ones(layerlake: Callable[..., Result], lake: str) -> None:
    result = layerlake("analyze", lake, "norms", "--run", "stdlib-gpt3")
    assert result.code == 2
    assert "Did you mean" in result.err


def test_a_plan_in_words(layerlake: Callable[..., Result]) -> None:
    """Without a dataset, for the analyses that are asked for, and with the time that a sample takes here."""
    shown = layerlake(
        "plan", "--model", MODEL, "--max-tokens", "2k", "--for", "lens,attention_locality", "--calibrate"
    )
    assert shown.code == 0, shown.err
    for words in ("resid", "attn_band", "PUT requests", "beside the model, at most", "TFLOP", "tokens/s"):
        assert words in shown.out
    assert "mlp_post" not in shown.out


def test_writers_share_a_capture_and_anyone_commits_it(layerlake: Callable[..., Result]) -> None:
    options = (
        "lake", "--model", MODEL, "--dataset", "text.txt", "--sites", "resid", "--partition-tokens", "256",
    )  # fmt: skip
    first = layerlake("capture", *options, "--partition", "0/2")
    assert first.code == 0
    assert "left to other writers" in first.err
    assert "not written" in layerlake("capture", *options, "--finalise").err
    assert json.loads(layerlake("ls", "lake", "--json").out) == []
    assert layerlake("capture", *options, "--partition", "1/2").code == 0
    assert len(json.loads(layerlake("ls", "lake", "--json").out)) == 1
    assert layerlake("capture", *options, "--finalise").code == 0
    assert layerlake("capture", *options, "--finalise", "--partition", "0/2").code == 2
    assert layerlake("capture", *options, "--partition", "2/2").code == 2
