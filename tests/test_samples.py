"""Samples: the noun, the readers and what they say of broken data."""

import base64
import dataclasses
import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mmq.recipes.samples import Sample, as_openai, digest, load


def picture(colour: str = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pics").mkdir()
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / "pics" / f"{colour}.png")
    return tmp_path


def write(folder: Path, *lines: object, name: str = "data.jsonl") -> Path:
    file = folder / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def openai(*urls: str) -> dict:
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "这是什么颜色？"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "红色。"}]}


def test_the_answer_and_the_question():
    place = {"type": "image"}
    sample = Sample(
        [
            {"role": "user", "content": [place, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A red "}, {"type": "text", "text": "field."}]},
        ],
        (picture(),),
        task="scene",
    )
    assert sample.answer == "A red field."
    assert sample.question.answer is None
    assert sample.question.messages == sample.messages[:1]
    assert sample.question.images == sample.images
    assert sample.question.task == "scene"
    asked = sample.question
    assert asked.question is asked
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.task = "other"  # type: ignore[misc]


def test_places_and_pictures_must_be_as_many():
    with pytest.raises(ValueError, match="1 places for images, but 0 came"):
        Sample([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="0 places for images, but 1 came"):
        Sample([{"role": "user", "content": "hello"}], (picture(),))


def test_openai_messages_by_path_file_url_and_data_url(folder):
    red, blue = folder / "pics" / "red.png", folder / "pics" / "blue.png"
    data = "data:image/png;base64," + base64.b64encode(red.read_bytes()).decode()
    (sample,) = load(write(folder, openai("pics/red.png", blue.as_uri(), data)))
    assert [im.getpixel((0, 0)) for im in sample.images] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "image", "image", "text"]
    assert sample.answer == "红色。"


def test_tags_stand_where_the_pictures_go(folder):
    line = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "<image>first, then <image>?"},
            {"role": "assistant", "content": "Red, then blue."},
        ],
        "images": ["pics/red.png", {"path": "pics/blue.png"}],
        "task": "colour",
    }
    (sample,) = load(write(folder, line))
    assert sample.messages[1]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "first, then "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    assert [im.getpixel((0, 0)) for im in sample.images] == [(255, 0, 0), (0, 0, 255)]
    assert sample.messages[0]["content"] == "Be short."
    assert sample.task == "colour"


def test_bare_image_parts_take_from_the_list(folder):
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    (sample,) = load(write(folder, {"messages": [{"role": "user", "content": content}], "images": ["pics/blue.png"]}))
    assert sample.images[0].getpixel((0, 0)) == (0, 0, 255)


def test_a_tag_beside_an_inline_picture_is_only_text(folder):
    parts = [{"type": "image", "image": "pics/red.png"}, {"type": "text", "text": "What does <image> mean?"}]
    (sample,) = load(write(folder, {"messages": [{"role": "user", "content": parts}]}))
    assert len(sample.images) == 1
    assert sample.messages[0]["content"][1]["text"] == "What does <image> mean?"


def test_query_and_response_with_history(folder):
    tagged = {"query": "What is <image>?", "response": "Red.", "images": ["pics/red.png"]}
    untagged = {
        "system": "Be short.",
        "query": "And now?",
        "response": "Still red.",
        "history": [["What colour?", "Red."]],
        "images": ["pics/red.png"],
    }
    first, second = load(write(folder, tagged, "", untagged))
    assert [p["type"] for p in first.messages[0]["content"]] == ["text", "image", "text"]
    assert first.answer == "Red."
    assert [m["role"] for m in second.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "What colour?"}]


def test_a_query_alone_has_no_answer(folder):
    (sample,) = load(write(folder, {"query": "你好"}))
    assert sample.answer is None
    assert sample.messages == [{"role": "user", "content": "你好"}]


def test_folders_of_jsonl_and_of_pictures(folder):
    pictures = load(folder)
    assert [s.images[0].getpixel((0, 0)) for s in pictures] == [(0, 0, 255), (255, 0, 0)]  # in the order of names
    assert pictures[0].messages[0]["content"][1]["text"] == "Describe this picture."
    write(folder, {"query": "two"}, name="b.jsonl")
    write(folder, {"query": "one"}, name="a.jsonl")
    assert [s.messages[0]["content"] for s in load(folder)] == ["one", "two"]  # JSONL goes before its pictures


def test_count_takes_the_first_and_reads_no_further(folder):
    file = write(folder, {"query": "a"}, {"query": "b"}, "{broken")
    assert [s.messages[0]["content"] for s in load(file, count=2)] == ["a", "b"]
    with pytest.raises(ValueError, match="0 samples asked"):
        load(file, count=0)
    assert len(load(f"{file}#1", count=2)) == 1  # as datasets are cut elsewhere


def test_a_byte_order_mark_and_unicode_line_separators_do_not_split_lines(folder):
    file = folder / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"query": "a\u2028b"}, ensure_ascii=False).encode() + b"\r\n")
    assert load(file)[0].messages[0]["content"] == "a\u2028b"


def test_pictures_come_upright_and_rgb(folder):
    wide = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    wide.convert("RGB").save(folder / "turned.jpg", exif=exif)
    wide.save(folder / "alpha.png")
    turned, alpha = load(write(folder, {"query": "", "images": ["turned.jpg", "alpha.png"]}))[0].images
    assert turned.size == (4, 8)
    assert alpha.mode == "RGB"


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "broken JSON: Expecting value at column 15"),
        ("[1, 2]", "no messages; a line is"),
        ({"text": "hello"}, "no messages; a line is"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, "a message is 'hello'"),
        ({"messages": [{"role": "human", "content": "hi"}]}, "unknown role 'human'; it must be one of system, user"),
        ({"messages": [{"role": "user"}]}, "the user's content is null; it must be text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "its type must be text, image or image_url"),
        ({"messages": [USER], "images": "pics/red.png"}, "images is 'pics/red.png'; it must be a list of paths"),
        ({"messages": [USER], "images": ["pics/red.png"]}, "0 <image> tags or image parts, but 1 in images"),
        ({"query": "<image><image>", "images": ["pics/red.png"]}, "2 <image> tags or image parts, but 1 in images"),
        ({"query": "what is <image>?"}, "1 <image> tags or image parts, but 0 in images"),
        ({"query": "", "images": ["pics/red.png", "pics/none.png"]}, "picture 2: no file .*none.png"),
        ({"query": "", "images": ["broken.png"]}, "picture 1: 'broken.png' cannot be read: not a picture PIL knows"),
        ({"query": "", "images": ["cut.png"]}, "picture 1: 'cut.png' cannot be read: .*truncated"),
        ({"query": "", "images": ["https://example.com/a.png"]}, "is on the web; samples are local"),
        ({"query": "", "images": ["data:image/png;base64,@@@"]}, "picture 1: 'data:image/png;base64,@@@' cannot be"),
        ({"query": "", "images": [3]}, "a picture is 3; it must be a path"),
        ({"query": 3}, "query must be text"),
        ({"query": "hi", "videos": ["a.mp4"]}, "videos cannot be read here"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(folder, line, said):
    (folder / "broken.png").write_bytes(b"no picture")
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3))
    (folder / "cut.png").write_bytes(png(noise)[:5000])
    file = write(folder, {"query": "good"}, line)
    with pytest.raises(ValueError, match=f"^{file}, line 2: .*{said}") as told:
        load(file)
    assert "\n" not in str(told.value)


def test_bytes_that_are_no_utf8_are_named_by_line(folder):
    file = folder / "gbk.jsonl"
    file.write_bytes(b'{"query": "ok"}\n{"query": "\xc4\xe3"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8 at byte 12"):
        load(file)


def test_a_source_that_is_nothing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*none"):
        load(folder / "none")
    with pytest.raises(ValueError, match=r"is no \.jsonl file"):
        load(folder / "pics" / "red.png")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .*jsonl and no pictures"):
        load(folder / "empty")
    with pytest.raises(ValueError, match="holds no samples"):
        load(write(folder, "", name="blank.jsonl"))


def test_digest_is_of_text_and_pixels_alone(folder):
    by_path = load(write(folder, {"query": "<image>what?", "response": "Red.", "images": ["pics/red.png"]}))
    picture("red").save(folder / "pics" / "other.bmp")
    by_bmp = load(write(folder, {"query": "<image>what?", "response": "Red.", "images": ["pics/other.bmp"]}))
    assert digest(by_path) == digest(by_bmp) == digest(iter(by_path))
    blue = [dataclasses.replace(by_path[0], images=(picture("blue"),))]
    other_shape = [dataclasses.replace(by_path[0], images=(picture("red", (6, 8)),))]
    other_text = load(write(folder, {"query": "<image>what?", "response": "Blue.", "images": ["pics/red.png"]}))
    assert len({digest(s) for s in (by_path, blue, other_shape, other_text, by_path * 2)}) == 5
    assert digest([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing


def test_as_openai_carries_the_pixels_and_reads_back(folder):
    (sample,) = load(write(folder, {"query": "<image>这是什么？", "response": "红色。", "images": ["pics/red.png"]}))
    messages = as_openai(sample)
    url = messages[0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert image.tobytes() == sample.images[0].tobytes()
    assert messages[1] == {"role": "assistant", "content": "红色。"}
    assert digest(load(write(folder, {"messages": messages}))) == digest([sample])


def test_as_openai_refuses_a_video():
    frames = [picture(), picture("blue")]
    sample = Sample([{"role": "user", "content": [{"type": "video"}]}], videos=(frames,))
    assert digest([sample]) != digest([dataclasses.replace(sample, videos=(frames[:1],))])
    with pytest.raises(ValueError, match="send its frames"):
        as_openai(sample)
