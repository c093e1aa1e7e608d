"""What btpipe says of the things it wrote: their facts, and the chain back to recipe and data."""

import json
import shutil
from pathlib import Path

import event_schema
import pytest
from one_of_each import copy, one_of_each, replace
from tiny_run import drifted_bundle
from typer.testing import CliRunner

from btpipe import artifact, cli, recipe
from btpipe.data.index import open_index
from btpipe.errors import NewerError, NumericsError, UsageError
from btpipe.events import Event, Link, ignore
from btpipe.export import contract
from btpipe.tools.inspect import inspect
from btpipe.tools.verify import verify
from btpipe.tools.verify_report import Verified

SAME, GONE = "here, the same", "not found near by"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_of_each(tmp_path_factory)


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    return copy(home, tmp_path / "copied")


def links(path: Path) -> dict[str, Link]:
    return {link.what: link for link in inspect(path).chain}


def test_vectors_lead_back_to_bundle_checkpoint_recipe_and_data(copied: Path) -> None:
    bundle = contract.open_bundle(copied / "exports/tiny")
    checkpoint = copied / "runs/tiny/checkpoints/step-00000003"
    expected = {
        "bundle": (bundle.digest, copied / "exports/tiny"),
        "checkpoint": (artifact.read(checkpoint, "checkpoint").digest, checkpoint),
        "recipe": (
            recipe.load(copied / "runs/tiny/recipe.toml").digest,
            copied / "runs/tiny/recipe.toml",
        ),
        "data": (
            open_index(copied / "runs/tiny/index.parquet").fingerprint,
            copied / "runs/tiny/index.parquet",
        ),
    }
    chain = links(copied / "v.parquet")
    assert list(chain) == ["input", "bundle", "checkpoint", "run", "recipe", "data"]
    for what, (digest, path) in expected.items():
        assert chain[what] == Link(what, digest, str(path), SAME)
    assert chain["run"] == Link("run", "", str(copied / "runs/tiny"), "here")
    assert list(links(copied / "exports/tiny")) == ["checkpoint", "run", "recipe", "data"]
    assert list(links(checkpoint)) == ["run", "recipe", "data"]
    assert links(copied / "v.rejects.parquet") == chain


def test_what_is_gone_or_another_is_told_with_the_digest_that_it_had(copied: Path) -> None:
    before = links(copied / "v.parquet")
    text = (copied / "runs/tiny/recipe.toml").read_text()
    replace(copied / "runs/tiny/recipe.toml", text.replace("seed = 3", "seed = 4").encode())
    shutil.rmtree(copied / "runs/tiny/checkpoints/step-00000003")
    after = links(copied / "v.parquet")
    assert after["recipe"].digest == before["recipe"].digest
    assert after["recipe"].found.startswith("here, but another: ")
    assert after["checkpoint"] == Link("checkpoint", before["checkpoint"].digest, "step 3", GONE)
    shutil.rmtree(copied / "runs")
    after = links(copied / "v.parquet")
    assert {after[what].found for what in ("checkpoint", "run", "recipe", "data")} == {GONE}
    assert after["data"].digest == before["data"].digest
    shutil.rmtree(copied / "exports")
    chain = links(copied / "v.parquet")
    assert list(chain) == ["input", "bundle"]
    assert chain["bundle"] == Link("bundle", before["bundle"].digest, "", GONE)


@pytest.mark.parametrize(
    ("name", "kind", "facts"),
    [
        ("runs/tiny", "run", {"network": "resnet18, 32 pixels", "checkpoints": "step-00000003"}),
        ("runs/tiny/recipe.toml", "run", {"images": "24"}),
        ("runs/tiny/checkpoints/step-00000003", "checkpoint", {"step": "3"}),
        ("exports/tiny", "bundle", {"network": "resnet18, small stem, 512 numbers out"}),
        ("exports/tiny/encoder.onnx", "bundle", {"run": "tiny", "step": "3"}),
        ("i.parquet", "index", {"images": "24", "depth": "decode", "labels": "a 12, b 12"}),
        ("runs/tiny/index.parquet", "index", {"depth": "header", "formats": "JPEG 24"}),
        ("v.parquet", "vectors", {"vectors": "24", "rejects": "0", "dimension": "512"}),
        ("v.rejects.parquet", "rejects", {"rejects": "0", "root": "images"}),
        ("small", "shards", {"quality": "90", "shorter_side": "24"}),
        ("small/shard-00000.tar", "shards", {"quality": "90"}),
        ("small/index.parquet", "index", {"images": "24"}),
    ],
)
def test_everything_that_btpipe_writes_is_known_by_itself_or_a_file_of_it(
    home: Path, name: str, kind: str, facts: dict[str, str]
) -> None:
    inspected = inspect(home / name)
    assert inspected.kind == kind
    assert facts.items() <= inspected.facts.items()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("runs/tiny", {"network": {"backbone": "resnet18", "image_size": 32}, "images": 24}),
        ("runs/tiny", {"epochs, batch": {"epochs": recipe.Optim().epochs, "batch_size": 8}}),
        ("runs/tiny/checkpoints/step-00000003", {"step": 3}),
        ("i.parquet", {"labels": {"a": 12, "b": 12}, "depth": {"depth": "decode", "images": 24}}),
        ("v.parquet", {"vectors": 24, "rejects": 0, "dimension": 512, "normalize": False}),
        ("small", {"quality": 90, "shorter_side": 24}),
    ],
)
def test_what_people_read_of_a_thing_is_a_value_too(
    home: Path, name: str, values: dict[str, object]
) -> None:
    inspected = inspect(home / name)
    assert list(inspected.values) == list(inspected.facts)
    assert values.items() <= inspected.values.items()


def test_a_gate_that_a_bundle_passed_is_shown(home: Path) -> None:
    inspected = inspect(home / "exports/tiny")
    gates = [name for name in inspected.facts if name.startswith("gate ")]
    assert gates
    for name in gates:
        gate = inspected.values[name]
        assert isinstance(gate, dict)
        assert f"mean_cosine {gate['mean_cosine']:.6g}" in inspected.facts[name]


def test_golden_images_are_embedded_and_compared(home: Path) -> None:
    cosines = inspect(home / "exports/tiny").values["golden images"]
    assert isinstance(cosines, dict)
    assert cosines["fp32"] > 0.999999
    events: list[Event] = []
    verify(home / "exports/tiny", events.append)
    assert [event.golden for event in events if isinstance(event, Verified)] == [cosines]


def test_other_golden_vectors_are_told_by_whatever_looks_at_a_bundle(
    home: Path, tmp_path: Path
) -> None:
    drifted = drifted_bundle(home / "exports/tiny", tmp_path / "drifted")
    cosines = inspect(drifted).values["golden images"]
    assert isinstance(cosines, dict)
    with pytest.raises(NumericsError, match=f"least cosine fp32 {cosines['fp32']:.6f}"):
        verify(drifted, ignore)
    printed = CliRunner().invoke(cli.app, ["doctor", "--model", str(drifted), "--json"])
    assert printed.exit_code != 0
    events = [json.loads(line) for line in printed.output.splitlines()]
    (findings,) = [event["findings"] for event in events if "findings" in event]
    (finding,) = [finding for finding in findings if finding["name"] == "golden images"]
    assert finding["verdict"] == "broken"
    assert f"{cosines['fp32']:.6f}" in finding["found"]


def test_scores_that_stand_beside_a_bundle_are_shown_if_they_are_of_it(copied: Path) -> None:
    bundle = copied / "exports/tiny"
    score = {
        "kind": "linear",
        "bundle": contract.open_bundle(bundle).digest,
        "test images": 1000,
        "top1": 0.5,
        "top1 95 %": [0.469, 0.531],
    }
    others = {"semisup": {**score, "bundle": "0" * 64}, "note": [1], "strange": {"kind": "x"}}
    for name, content in {"linear": score, **others}.items():
        (bundle.parent / f"tiny.{name}.json").write_text(json.dumps(content))
    inspected = inspect(bundle)
    scores = {name: text for name, text in inspected.facts.items() if "top-1" in text}
    text = "top-1 50.0 % (46.9 to 53.1) of 1,000 test images, tiny.linear.json"
    assert scores == {"eval linear": text}
    assert inspected.values["eval linear"] == score


def test_people_read_short_digests_and_machines_whole_ones(home: Path) -> None:
    digest = contract.open_bundle(home / "exports/tiny").digest
    printed = CliRunner().invoke(cli.app, ["inspect", str(home / "exports/tiny")])
    assert printed.exit_code == 0
    assert digest[:12] in printed.stdout
    assert digest not in printed.stdout
    output = CliRunner().invoke(cli.app, ["inspect", str(home / "v.parquet"), "--json"])
    (event,) = event_schema.read(output.stdout)
    assert (event["event"], event["kind"], event["facts"]["bundle"]) == (
        "Inspected",
        "vectors",
        digest,
    )
    assert {"what": "bundle", "digest": digest}.items() <= event["chain"][1].items()


def test_what_btpipe_did_not_write_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "notes.txt", home / "images"):
        with pytest.raises(UsageError, match="a run, checkpoint, bundle"):
            inspect(path)


def test_what_a_newer_btpipe_wrote_is_said_so(copied: Path) -> None:
    path = copied / "exports/tiny/manifest.json"
    content = json.loads(path.read_text()) | {"format_version": 99, "btpipe_version": "9.1"}
    replace(path, json.dumps(content).encode())
    with pytest.raises(NewerError, match=r"install btpipe 9\.1 or newer"):
        inspect(copied / "exports/tiny")
