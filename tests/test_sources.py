"""Where images and captions come from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.caching import STEP, PoolEncoder, assert_same, contents, draw, encoded, write_tar

from edit_core.distill.cache import build_cache
from edit_core.distill.sources import DatasetSource, FolderSource, TarSource
from edit_core.errors import EDiTError


def test_sources_without_anything_usable_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EDiTError, match="there is no such folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(EDiTError, match="holds no image"):
        FolderSource(tmp_path / "empty")
    with pytest.raises(EDiTError, match="there is no such tar"):
        TarSource([tmp_path / "none.tar"])
    folder = draw(tmp_path / "i", [(80, 80)] * 2)
    with pytest.raises(EDiTError, match="no image could be cached: left out: 2 too small for 512"):
        build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "small", [512])
    for path in folder.rglob("*.txt"):
        path.unlink()
    with pytest.raises(EDiTError, match="none of its 2 images has a caption"):
        build_cache(FolderSource(folder), PoolEncoder(), tmp_path / "c", [64], **STEP)


def test_tars(tmp_path: Path) -> None:
    one = write_tar(
        tmp_path / "one.tar",
        [("a.png", encoded((80, 70))), ("a.txt", b"first"), ("a.cls", b"7"), ("d.e/b.txt", b"second"),
         ("d.e/b.jpg", encoded((64, 64), 1)), ("c.png", encoded((64, 64)))],
    )  # fmt: skip
    two = write_tar(tmp_path / "two.tar", [("a.png", b"broken"), ("a.txt", b"third"), ("z.txt", b"alone")])
    found = [(item.name, item.caption) for item in TarSource([one, two])]
    names = ["one.tar/a.png", "one.tar/d.e/b.jpg", "one.tar/c.png", "two.tar/a.png"]
    assert found == list(zip(names, ["first", "second", None, "third"], strict=True))
    report = build_cache(TarSource([one, two]), PoolEncoder(), tmp_path / "c", [64], **STEP)
    assert (report.images, report.cached, report.no_caption, report.broken) == (4, {"64": 2}, 1, 1)
    latent = contents(tmp_path / "c", [64])[64, "one.tar/d.e/b.jpg"]["latent"]
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded((64, 64), 1))))).permute(2, 0, 1)
    assert torch.equal(latent, PoolEncoder().encode_images(pixels[None])[0])

    (tmp_path / "cut.tar").write_bytes(one.read_bytes()[:9000])
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    for name in ("cut.tar", "packed.tar"):
        with pytest.raises(EDiTError, match=rf"{name}: not a whole, uncompressed tar"):
            list(TarSource([tmp_path / name]))
    with pytest.raises(EDiTError, match="no image is in there"):
        list(TarSource([write_tar(tmp_path / "text.tar", [("a.txt", b"x")])]))


def test_hugging_face_datasets_on_disk_and_streamed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [encoded((64, 64), 1), encoded((80, 70), 2), b"broken", None, encoded((40, 40), 3)]
    table = datasets.Dataset.from_dict(
        {"picture": [{"bytes": row, "path": None} if row else None for row in rows],
         "words": ["one", "two", "three", "four", None], "other": range(5)},
        features=datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string"),
                                    "other": datasets.Value("int64")}),
    )  # fmt: skip
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "split")
    (tmp_path / "stream").mkdir()
    table.to_parquet(tmp_path / "stream" / "train-00000.parquet")
    found = []
    for name in ("plain", "split", "stream"):
        source = DatasetSource(str(tmp_path / name), "picture", "words")
        assert source.count == (0 if name == "stream" else 5)
        report = build_cache(source, PoolEncoder(), tmp_path / f"c_{name}", [64], **STEP)
        assert (report.images, report.cached, report.broken, report.no_caption) == (5, {"64": 2}, 2, 1), report
        found.append(contents(tmp_path / f"c_{name}", [64]))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    with pytest.raises(EDiTError, match="no column 'image'; it has picture, words, other"):
        DatasetSource(str(tmp_path / "plain"))
    with pytest.raises(EDiTError, match="no split 'test', but train"):
        DatasetSource(str(tmp_path / "split"), "picture", "words", "test")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(EDiTError, match="cannot be opened as a dataset"):
        DatasetSource(str(tmp_path / "nothing"))
