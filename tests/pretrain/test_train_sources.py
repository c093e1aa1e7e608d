"""A run on what is not a folder of images: shards, tables and lists, and its resume."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import draw_images

from btpipe import recipe
from btpipe.data.index import build, open_index
from btpipe.data.scan import scan
from btpipe.errors import RefusedError, UsageError
from btpipe.events import ignore
from btpipe.pretrain import checkpoint, folder, knn, launch

IMAGES = 12


def described(*inputs: Path) -> recipe.Recipe:
    data = recipe.Data(train=tuple(map(str, inputs)), batch_size=8, image_size=32)
    return recipe.Recipe(data=data, network=recipe.Network(backbone="resnet18"))


def shard(path: Path, files: list[Path]) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in files:
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            tar.addfile(info, io.BytesIO(file.read_bytes()))
    return path


def test_a_run_takes_several_inputs_and_knows_when_one_changes(tmp_path: Path) -> None:
    files = draw_images(tmp_path / "drawn", IMAGES)
    tar = shard(tmp_path / "a.tar", files[:6])
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files[6:]]}), table)
    tiny, run = described(tar, table), tmp_path / "run"
    folder.prepare(run, tiny, ignore)
    assert len(open_index(run / folder.INDEX)) == IMAGES
    assert recipe.load(run / folder.RECIPE) == tiny
    folder.prepare(run, tiny, ignore)  # the same recipe: it may go on
    folder.require_same_images(run)
    shard(tar, files[1:6])
    with pytest.raises(RefusedError, match=r"data\.train(.|\n)*1 removed \(a\.tar::000\.jpg\)"):
        folder.require_same_images(run)
    with pytest.raises(RefusedError, match=r"data\.train is"):
        folder.prepare(run, described(tar), ignore)


@pytest.mark.parametrize("kind", ["folder", "list", "parquet", "tar", "index"])
def test_any_input_with_labels_may_judge_a_run(tmp_path: Path, kind: str) -> None:
    files = draw_images(tmp_path / "folder", 6)
    labels = [path.parent.name for path in files]
    index, _ = build(tmp_path / "folder")
    index.save(tmp_path / "index.parquet")
    lines = [f"{path},{label}" for path, label in zip(files, labels, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    contents = [path.read_bytes() for path in files]
    pq.write_table(pa.table({"image": contents, "label": labels}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, (content, label) in enumerate(zip(contents, labels, strict=True)):
            for name, part in ((f"{i}.jpg", content), (f"{i}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    named: dict[str, str] = {
        "list": "list.csv",
        "parquet": "t.parquet",
        "tar": "a.tar",
        "index": "index.parquet",
    }
    health = recipe.Health(knn=str(tmp_path / named.get(kind, kind)))
    labelled = knn.labelled_images(recipe.Recipe(health=health), ignore)
    assert labelled is not None
    assert sorted(map(str, labelled.labels)) == sorted(labels)
    for row, class_name in enumerate(labelled.labels):
        assert class_name == labels[contents.index(labelled.read_bytes(row))]


def test_a_run_from_an_index_that_was_only_listed_trains_as_from_one_with_sizes(
    tmp_path: Path,
) -> None:
    draw_images(tmp_path / "images", 16)
    weights = []
    for depth in ("list", "header"):
        scan(tmp_path / "images", tmp_path / f"{depth}.parquet", ignore, depth=depth)
        tiny = recipe.Recipe(
            data=described(tmp_path / f"{depth}.parquet").data,
            network=recipe.Network(backbone="resnet18", projector=(16, 16)),
            optim=recipe.Optim(epochs=1, warmup_epochs=0),
        )
        for _ in range(2):  # the second one finds nothing changed, and nothing to do
            launch.pretrain(tmp_path / depth, tiny, devices="1", mode="json")
        newest = checkpoint.newest(tmp_path / depth)
        assert newest is not None
        weights.append((newest / "model.safetensors").read_bytes())
    assert set(open_index(tmp_path / "list" / folder.INDEX).widths) == {0}
    assert weights[0] == weights[1]


def test_an_input_of_no_known_kind_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    for inputs in ((tmp_path / "notes.md",), (tmp_path / "missing",), ()):
        with pytest.raises(UsageError, match=r"data\.train(.|\n)*folders of images.*tar shards"):
            folder.prepare(tmp_path / "run", described(*inputs), ignore)
    assert not (tmp_path / "run").exists()


def test_data_train_may_be_set_to_one_or_to_a_list(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("")
    one = recipe.load(tmp_path / "r.toml", ["data.train=a.tar"])
    several = recipe.load(tmp_path / "r.toml", ['data.train=["a.tar", "b"]'])
    assert (one.data.inputs, several.data.inputs) == (("a.tar",), ("a.tar", "b"))
    (tmp_path / "again.toml").write_text(several.to_toml())
    assert recipe.load(tmp_path / "again.toml") == several
