"""Captions in the forms that trainers know; what cannot be used is named and counted, and nothing is guessed."""

from __future__ import annotations

import codecs
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.caching import STEP, PoolEncoder, encoded, write_tar
from support.web import serve

from edit_core.cli import main
from edit_core.distill.cache import CacheReport, build_cache
from edit_core.distill.sources import DatasetSource, FolderSource, Item, TarSource
from edit_core.errors import EDiTError

PICTURE = encoded((64, 64))
Files = dict[str, bytes]


def fill(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def sources(files: Files, tmp_path: Path) -> list[tuple[Any, list[Item]]]:
    """The same files as a folder and as a tar, read; names without the tar's."""
    folder = FolderSource(fill(tmp_path / "files", files))
    tar = TarSource([write_tar(tmp_path / "files.tar", files.items())])
    inside = [item._replace(name=item.name.removeprefix("files.tar/")) for item in tar]
    return [(folder, list(folder)), (tar, inside)]


def lines(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


# --- every form ---


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": b"a fox", "sub/b.txt": b"a bear"},
        {"a.caption": b"a fox", "sub/b.caption": b"a bear\n"},
        {"a.TXT": b"a fox", "sub/b.png.txt": b"a bear"},
        {"metadata.jsonl": lines(*({"file_name": name, "text": text}
                                   for name, text in (("a.png", "a fox"), ("sub/b.png", "a bear"))))},
        {"metadata.jsonl": lines({"file_name": "a.png", "prompt": "a fox", "other": 3}),
         "sub/metadata.jsonl": codecs.BOM_UTF8 + lines({"file_name": "b.png", "caption": "a bear"})},
        {"metadata.csv": b'file_name,text\r\na.png,a fox\r\n"sub/b.png","a bear"\r\n'},
        {"meta_cap.json": json.dumps({"a": {"caption": "a fox"}, "sub/b.png": {"tags": "a bear"}}).encode()},
        {"a.txt": b"a fox", "a.caption": b"a fox\n", "sub/b.caption": b"a bear",
         "metadata.jsonl": lines({"file_name": "a.png", "text": "a fox"})},
    ],
    ids=["txt", "caption", "names", "jsonl", "jsonl-each", "csv", "kohya", "agreeing"],
)  # fmt: skip
def test_captions_are_found_in_every_form(files: Files, tmp_path: Path) -> None:
    for source, items in sources({"a.png": PICTURE, "sub/b.png": PICTURE, **files}, tmp_path):
        assert [(item.name, item.caption, item.problem) for item in items] == [
            ("a.png", "a fox", ""), ("sub/b.png", "a bear", "")
        ]  # fmt: skip
        assert dict(source.others) == {}
        source.require_captions()


def test_kohyas_tags_follow_its_caption_and_whole_paths_are_known(tmp_path: Path) -> None:
    fill(tmp_path, {"i/a.png": PICTURE, "i/b.jpg": PICTURE})
    table = {str(tmp_path / "i" / "a.png"): {"caption": "a fox", "tags": "snow, dusk"}, "b": {"tags": "sea"}}
    fill(tmp_path, {"i/meta_lat.json": json.dumps(table).encode()})
    assert [item.caption for item in FolderSource(tmp_path / "i")] == ["a fox, snow, dusk", "sea"]


@pytest.mark.parametrize(
    ("files", "places"),
    [
        ({"a.txt": b"tags", "a.caption": b"a fox"}, "a.caption and a.txt"),
        ({"a.txt": b"one", "metadata.jsonl": lines({"file_name": "a.png", "text": "two"})},
         "a.txt and metadata.jsonl's text"),
        ({"metadata.jsonl": lines({"file_name": "a.png", "text": "one", "caption": "two"})},
         "metadata.jsonl's caption and metadata.jsonl's text"),
        ({"metadata.jsonl": lines(*({"file_name": "a.png", "text": text} for text in "xy"))},
         "metadata.jsonl's text and metadata.jsonl's text"),
    ],
)  # fmt: skip
def test_captions_that_differ_are_not_chosen_from(files: Files, places: str, tmp_path: Path) -> None:
    for _, items in sources({"a.png": PICTURE, **files}, tmp_path):
        (item,) = items
        assert (item.caption, item.problem) == (None, f"its captions differ in {places}; keep one of them")


# --- nothing is decoded by guess ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["Schlösser – “alt”", "狐"])
def test_byte_order_marks_are_honoured(encoding: str, text: str, tmp_path: Path) -> None:
    for _, items in sources({"a.png": PICTURE, "a.txt": text.encode(encoding)}, tmp_path):
        assert items[0].caption == text


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("caf\xe9".encode("cp1252"), "byte 3 is not UTF-8; save it as UTF-8"),
        ("a fox".encode("utf-16-le"), "zero bytes, as UTF-16 without a byte-order mark"),
        ("a fox".encode("utf-16-be"), "zero bytes, as UTF-16 without a byte-order mark"),
        ("狐狸".encode("shift_jis", "ignore"), "is not UTF-8"),
        (codecs.BOM_UTF16_LE + b"abc", "byte 4 is not UTF-16-LE"),
    ],
)
def test_a_caption_in_an_unknown_encoding_is_left_out_and_named(data: bytes, part: str, tmp_path: Path) -> None:
    files = {"a.png": PICTURE, "a.txt": data, "b.png": PICTURE, "b.txt": b"a bear"}
    for source, items in sources(files, tmp_path):
        assert [item.caption for item in items] == [None, "a bear"]
        assert items[0].problem.startswith("its caption a.txt cannot be read (")
        assert part in items[0].problem
        report = build_cache(source, PoolEncoder(), tmp_path / f"c{source.count}", [64], **STEP)
        assert (report.images, report.cached, report.unusable, report.no_caption) == (2, {"64": 1}, 1, 0)
        assert "left out: 1 with a caption that cannot be used" in str(report)
        assert part in str(report)


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name"', "line 2 is not JSON"),
        ("metadata.jsonl", b'["a.png", "x"]', "line 1 is no JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "é"}'.encode("cp1252"), "byte 32 is not UTF-8"),
        ("meta_cap.json", b"[1]", "kohya's holds an object for each image"),
        ("meta_clean.json", b"{", "is no list of captions"),
    ],
)
def test_a_damaged_list_of_captions_is_one_sentence(name: str, data: bytes, part: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "i", {"a.png": PICTURE, name: data})
    with pytest.raises(EDiTError, match=part) as caught:
        FolderSource(folder)
    assert name in str(caught.value)
    with pytest.raises(EDiTError, match=part):
        list(TarSource([write_tar(tmp_path / "t.tar", {"a.png": PICTURE, name: data}.items())]))


# --- used, left out, and why: it adds up ---


def test_what_is_used_and_what_is_left_out_add_up_to_what_lies_there(tmp_path: Path) -> None:
    files = {
        "a.png": PICTURE, "a.txt": b"used",
        "img_1.5.jpg": PICTURE, "img_1.5.txt": b"used: dots belong to the name",
        "b.png": PICTURE,
        "c.png": b"broken", "c.txt": b"used",
        "d.webp": PICTURE, "d.txt": b"\xff\xff",
        "small.png": encoded((20, 20)), "small.txt": b"used",
        "e.gif": b"", "f.GIF": b"", "clip.mp4": b"", "README": b"", "alone.txt": b"x", "a.json": b"{}",
        "metadata.jsonl": lines({"file_name": "none.png", "text": "x"}, {"text": "y"}, {"file_name": "b.png", "w": 3}),
    }  # fmt: skip
    others = {
        ".gif": 2, ".mp4": 1, ".json": 1, "files without a suffix": 1, "captions without an image": 1,
        "entries of metadata.jsonl that no image was found for": 1, "entries of metadata.jsonl that name no file": 1,
        "entries of metadata.jsonl without a text": 1,
    }  # fmt: skip
    for source, items in sources(files, tmp_path):
        assert dict(source.others) == others
        assert {item.name: item.caption for item in items}["img_1.5.jpg"] == "used: dots belong to the name"
        report = build_cache(source, PoolEncoder(), tmp_path / f"c{source.count}", [64], **STEP)
        left = report.no_caption + report.unusable + report.broken + report.duplicates + report.too_small["64"]
        assert report.images == 6 == report.cached["64"] + left
        assert (report.no_caption, report.unusable, report.broken, report.too_small["64"]) == (1, 1, 1, 1)
        captions = 5  # of the images, one of them unusable
        kinds = sum(count for kind, count in others.items() if not kind.startswith("entries"))
        assert report.images + captions + kinds + 1 == len(files)  # and metadata.jsonl
        assert "neither an image nor an image's caption: " in str(report)
        assert "2 .gif" in str(report)


def test_linked_folders_are_followed_once_and_broken_links_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "i", {"a.png": PICTURE, "a.txt": b"here", "z/b.png": PICTURE, "z/b.txt": b"below"})
    fill(tmp_path / "elsewhere", {"c.png": PICTURE, "c.txt": b"linked", "deep/d.png": PICTURE, "deep/d.txt": b"deep"})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "z")
    (folder / "z" / "loop").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "file.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    os.mkfifo(folder / "pipe.png")
    source = FolderSource(folder)
    assert {item.name: item.caption for item in source} == {
        "a.png": "here", "z/b.png": "below", "link/c.png": "linked", "link/deep/d.png": "deep", "file.png": None
    }  # fmt: skip
    assert dict(source.others) == {
        "links to nothing": 1, "special files": 1, "linked folders that are read already": 3
    }  # fmt: skip


def test_links_in_tars_are_counted(tmp_path: Path) -> None:
    with tarfile.open(write_tar(tmp_path / "t.tar", [("a.png", PICTURE), ("a.txt", b"x")]), "a") as tar:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE), ("d.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
    source = TarSource([tmp_path / "t.tar"])
    assert [item.name for item in source] == ["t.tar/a.png"]
    assert source.others == {"links in tars": 2, "special files": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "i", {"a.png": PICTURE, "closed/b.png": PICTURE})
    (folder / "closed").chmod(0)
    try:
        with pytest.raises(EDiTError, match="closed: this folder of images cannot be read"):
            FolderSource(folder)
    finally:
        (folder / "closed").chmod(0o700)


# --- none has a caption ---


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            {"a.json": b"{}", "b.json": b"{}"},
            ["none of its 2 images has a caption; looked for a .txt", "found 2 .json"],
        ),
        ({"captions/a.txt": b"x"}, ["found 1 captions without an image"]),
        (
            {"metadata.jsonl": lines({"file_name": "a.png", "label": 3})},
            ["found 1 entries of metadata.jsonl without a"],
        ),
        ({"a.txt": b"\xff", "b.txt": b"\xfe"}, ["a caption that can be used (", "a.png: its caption a.txt cannot be"]),
        ({"a.txt": b" "}, ["found nothing else; write a .txt for each image"]),
    ],
)
def test_where_no_image_has_a_caption_it_says_at_once_what_was_found(
    files: Files, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a.png": PICTURE, "b.png": PICTURE, **files}
    folder, tar = fill(tmp_path / "i", files), write_tar(tmp_path / "t.tar", files.items())
    for given in (["--images", str(folder)], ["--tars", str(tar)]):
        command = ["cache", "--model", str(tmp_path / "no model"), *given, "--output", str(tmp_path / "c")]
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert all(part in err for part in parts), err  # before the model is looked for
        assert not (tmp_path / "c").exists()


def test_the_order_of_a_local_tar_does_not_matter(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(4)]
    for order in (("png", "txt"), ("txt", "png")):
        members = [(f"{name}.{end}", PICTURE if end == "png" else name.encode()) for end in order for name in names]
        tar = write_tar(tmp_path / f"{order[0]}.tar", members)
        assert [item.caption for item in TarSource([tar])] == names


def test_captions_that_a_stream_gives_too_late_are_counted(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(4)]
    images, texts = [(f"{n}.png", PICTURE) for n in names], [(f"{n}.txt", n.encode()) for n in names]
    write_tar(tmp_path / "late.tar", [*images, *texts, ("alone.txt", b"x"), ("x.cls", b"1")])
    write_tar(tmp_path / "early.tar", [*texts, *images])
    table = lines(*({"file_name": name, "text": name[0]} for name, _ in images))
    write_tar(tmp_path / "table.tar", [("metadata.jsonl", table), *images])
    write_tar(tmp_path / "dots.tar", [("d.1/a.1.jpg", PICTURE), ("d.1/a.1.txt", b"dots"), ("d.1/a.2.jpg", PICTURE)])
    with serve(tmp_path) as web:
        late = TarSource([f"{web.url}/late.tar"])
        late.require_captions()  # read once: it only shows when it is
        with pytest.raises(
            EDiTError, match=r"none of its 4 images has a caption; .*4 captions that come too long after"
        ):
            build_cache(late, PoolEncoder(), tmp_path / "c", [64], **STEP)
        assert {kind: count for kind, count in late.others.items() if count} == {
            ".cls": 1, "captions without an image": 1,
            "captions that come too long after their image (sort the tar by name)": 4,
        }  # fmt: skip
        for name in ("early", "table"):
            assert [item.caption for item in TarSource([f"{web.url}/{name}.tar"])] == names
        assert [item.caption for item in TarSource([f"{web.url}/dots.tar"])] == ["dots", None]


def test_columns_that_hold_no_text_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": PICTURE, "path": None}] * 2, "label": [1, 2], "text": [None, " "],
            "raw": [b"a fox", "caf\xe9".encode("cp1252")]}  # fmt: skip
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), "text": datasets.Value("string"),
                "raw": datasets.Value("binary")}  # fmt: skip
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "d")
    with pytest.raises(
        EDiTError, match=r"none of its 2 rows has a caption that can be used \(its label is of type int"
    ):
        DatasetSource(str(tmp_path / "d"), "image", "label").require_captions()
    with pytest.raises(EDiTError, match="none of its 2 rows has a caption; choose another --caption-column"):
        DatasetSource(str(tmp_path / "d")).require_captions()
    raw = DatasetSource(str(tmp_path / "d"), "image", "raw")
    raw.require_captions()
    assert [item.caption for item in raw] == ["a fox", None]
    report = build_cache(raw, PoolEncoder(), tmp_path / "c", [64], **STEP)
    assert (report.images, report.cached, report.unusable) == (2, {"64": 1}, 1)


def test_captions_longer_than_is_read_are_counted_on_every_run(tmp_path: Path) -> None:
    files = {f"{i}.png": PICTURE for i in range(3)} | {f"{i}.txt": b"word " * (30 if i else 3) for i in range(3)}
    folder, encoder = fill(tmp_path / "i", files), PoolEncoder()
    for _ in range(2):
        report: CacheReport = build_cache(
            FolderSource(folder), encoder, tmp_path / "c", [64], too_long=encoder.too_long, **STEP
        )
        assert report.cut == {"20 words": 2}
        assert "captions that are not read to their end: 2 over 20 words" in str(report)
