"""The readers of what anybody may have made, fed with what nobody would make: only ValueError and OSError come out, in
a line, and nothing is read that another reader of the format refuses. `pytest -m slow` asks for more of each."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError, safe_open

from mmq.export.artifact import open_artifact
from mmq.export.subject import read_subject
from mmq.recipes.folder import headers
from mmq.recipes.plain import is_plain_name, parse_json, shown
from mmq.recipes.reading import read
from mmq.recipes.recipe import Recipe, parse, show
from mmq.serve.questions import Question, question_of, read_lines

REFUSED = (ValueError, OSError)
LONGEST = 5_000  # characters of a message

often = pytest.mark.parametrize(
    "examples", [pytest.param(150, id="some"), pytest.param(5_000, id="many", marks=pytest.mark.slow)]
)


def holds(examples: int, *what: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run a property over so many examples: the same ones at each run where they are few."""
    few = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1_000,
        suppress_health_check=tuple(HealthCheck),  # type: ignore[arg-type]
    )
    return lambda property_: few(given(*what)(property_))()


def told(error: BaseException) -> str:
    """An error's message, which must be words for a person."""
    assert isinstance(error, REFUSED), repr(error)
    assert type(error).__module__ == "builtins" or isinstance(error, OSError)
    assert 0 < len(str(error)) < LONGEST
    return str(error)


def asked(file: Path) -> list[Question]:
    """A dataset as a server is asked it."""
    return [question_of(line) for line in read_lines([file])]


def result(call: Callable[[], Any], words: str = "") -> Any:
    """What a reader returns, or None where it refuses as it should, in a message with these words."""
    try:
        return call()
    except Exception as e:
        message = told(e)
    assert words in message
    return None


# What stands in files: the odd numbers, texts with halves of pairs and control characters, anything within anything.
numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400]), st.floats())
texts = st.text(st.characters(exclude_categories=()), max_size=12)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)), max_leaves=8
)


def among(names: list[str], values: st.SearchStrategy[Any] = anything) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, and a stranger at times."""
    return st.dictionaries(st.one_of(st.sampled_from(names), texts), values, max_size=6)


def as_json(data: Any) -> bytes:
    try:
        return json.dumps(data).encode()
    except ValueError:  # a number with more digits than Python writes
        return b"9" * 5_000


def spoiled(sound: bytes) -> st.SearchStrategy[bytes]:
    """`sound` with a few bytes changed, taken out or put in."""
    change = st.tuples(st.integers(0, len(sound)), st.integers(0, 8), st.binary(max_size=8))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = sound
        for at, gone, new in changes:
            data = data[:at] + new + data[at + gone :]
        return data

    return st.lists(change, max_size=4).map(apply)


@often
def test_json_is_read_or_refused(examples: int) -> None:
    @holds(examples, st.one_of(st.binary(max_size=200), anything.map(as_json), spoiled(b'{"a": [1, {"b": null}]}')))
    def reads(data: bytes) -> None:
        for unique in (False, True):
            result(lambda unique=unique: parse_json(data, where="it", unique=unique), "it is not valid JSON")


@often
def test_what_is_shown_has_no_orders_for_a_terminal(examples: int) -> None:
    @holds(examples, texts)
    def shows(text: str) -> None:
        safe = shown(text)
        assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in safe)
        assert shown(safe) == safe
        safe.encode()


@often
def test_a_plain_name_stays_in_its_folder(examples: int, tmp_path: Path) -> None:
    @holds(examples, st.one_of(texts, st.text("./\\ab\0:", max_size=8)))
    def stays(name: str) -> None:
        if is_plain_name(name):
            inside = Path(os.path.normpath(tmp_path / name))
            assert inside.parent == tmp_path
            assert inside.name == name


dtypes = st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "F4", "BOOL", "F31", ""]), plain)
sizes = st.one_of(st.integers(0, 9), numbers, plain)
shapes = st.one_of(st.lists(sizes, max_size=3), anything)
places = st.one_of(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(list), st.lists(sizes, max_size=3), anything)
entries = st.one_of(
    st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": places}),
    among(["dtype", "shape", "data_offsets"]),
    plain,
)
SOUND = {"a": hostile.entry((2, 3), (0, 24)), "b.c": hostile.entry((), (24, 26), "F16")}
lengths = st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1))


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that is right, in its tensors' order or another, and how many bytes of data it has."""
    at, header = 0, {}
    for name in draw(st.lists(texts, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        size = width
        for one in shape:
            size *= one
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    names = draw(st.permutations(list(header)))
    return {name: header[name] for name in names}, at


weights = st.one_of(
    sound_headers().map(lambda made: hostile.tensors(made[0], bytes(made[1]))),
    st.builds(
        lambda header, size, length: hostile.tensors(as_json(header), bytes(size), length=length),
        st.one_of(st.dictionaries(st.one_of(texts, st.just("__metadata__")), entries, max_size=3), anything),
        st.integers(0, 40),
        lengths,
    ),
    spoiled(hostile.tensors(SOUND, bytes(26))),
    st.binary(max_size=64),
)


@often
def test_weights_are_read_as_safetensors_reads_them(examples: int, tmp_path: Path) -> None:
    """What the library refuses is refused; what both take, they take alike."""
    path = tmp_path / "model.safetensors"
    seen = {"taken": 0, "refused": 0}

    @holds(3 * examples, weights)
    def reads(data: bytes) -> None:
        path.write_bytes(data)
        ours = result(lambda: headers(path))
        try:
            with safe_open(path, framework="np") as file:
                theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                shapes = {name: (one.get_dtype(), list(one.get_shape())) for name, one in theirs.items()}
        except (SafetensorError, OSError):
            assert ours is None, data
            seen["refused"] += 1
            return
        seen["taken"] += 1
        if ours is not None:
            mine = {n: (e["dtype"], list(e["shape"])) for n, e in ours.items() if n != "__metadata__"}
            assert mine == shapes

    assert min(seen.values()) > examples / 5, seen  # both happen, or nothing was tried


@often
def test_sound_weights_are_taken(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    @holds(examples, sound_headers())
    def takes(made: tuple[dict[str, Any], int]) -> None:
        if any("\ud800" <= c <= "\udfff" for name in made[0] for c in name) or "__metadata__" in made[0]:
            return
        path.write_bytes(hostile.tensors(made[0], bytes(made[1])))
        assert headers(path) == made[0]


CONFIG_KEYS = [
    *("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "layer_types", "max_position_embeddings", "vocab_size", "dtype", "torch_dtype", "auto_map"),
    *("text_config", "vision_config", "quantization_config", "intermediate_size", "kv_lora_rank", "qk_rope_head_dim"),
    *("tie_word_embeddings", "num_experts", "patch_size", "image_size", "depth", "version", "sliding_window"),
    *("rope_parameters", "rope_scaling", "max_slice_num", "query_num", "downsample_ratio", "visual"),
]
QUANTIZATION_KEYS = [
    *("quant_method", "bits", "group_size", "version", "format", "zero_point", "sym", "desc_act", "config_groups"),
    *("modules_to_not_convert", "ignore", "load_in_4bit", "bnb_4bit_quant_type", "packing_format", "lm_head"),
    *("quantization_status", "kv_cache_scheme", "checkpoint_format", "llm_int8_skip_modules", "block_name_to_quantize"),
]


def changed(folder: Path, changes: dict[str, Any], quantization: Any) -> bytes:
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = {**said, **changes}
    if quantization is not None:
        whole["quantization_config"] = quantization
    return as_json(whole)


@often
def test_configs_are_read_or_refused(examples: int, tmp_path: Path) -> None:
    """By the planner, the engines' rules and the launch lines of every engine."""
    from mmq.export.convert import settle
    from mmq.serve.engines import lines
    from mmq.serve.machine import this_machine
    from mmq.serve.rules.verdicts import PLACES, verdicts

    folder = hostile.model(tmp_path / "model")
    original = (folder / "config.json").read_bytes()
    inner = among(CONFIG_KEYS, st.one_of(plain, st.integers(1, 64), anything))
    nested = st.one_of(inner, st.dictionaries(st.sampled_from(["text_config", "vision_config"]), inner, max_size=2))
    group = among(["weights", "targets", "format"], st.one_of(plain, among(["num_bits", "group_size", "strategy"])))
    groups = st.dictionaries(texts, st.one_of(group, plain), max_size=2)
    packed = st.one_of(
        st.none(),
        st.builds(
            lambda method, rest: {**rest, "quant_method": method},
            st.sampled_from(["awq", "gptq", "compressed-tensors", "bitsandbytes", "fp8", ""]),
            among(QUANTIZATION_KEYS, st.one_of(plain, st.lists(texts, max_size=2), anything, groups)),
        ),
    )
    machine = this_machine()

    @holds(examples, nested, packed)
    def reads(changes: dict[str, Any], quantization: Any) -> None:
        (folder / "config.json").write_bytes(original)
        (folder / "config.json").write_bytes(changed(folder, changes, quantization))
        if result(lambda: read_subject(folder)) is None:
            return
        result(lambda: list(verdicts(folder, PLACES)))
        result(lambda: settle(folder, None))
        for engine in ("vllm", "pytorch"):
            result(lambda engine=engine: lines(engine, folder, machine=machine))


MANIFEST_KEYS = ["schema", "name", "method", "format", "recipe", "base", "files", "calibration", "versions"]
file_names = st.one_of(st.sampled_from(["config.json", "../x", "/etc/passwd", "a/b", "model.safetensors", "."]), texts)
hashes, counts = st.one_of(st.just("0" * 64), plain), st.one_of(st.just(2), plain)
file_entries = st.one_of(st.fixed_dictionaries({"sha256": hashes, "size": counts}), anything)


@often
def test_manifests_are_read_or_refused(examples: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    maybe = st.one_of(st.none(), texts)
    bases = st.fixed_dictionaries(
        {"model": maybe, "hub": texts, "revision": maybe, "weight_bytes": st.one_of(st.just(1), plain)}
    )
    recipes = st.fixed_dictionaries({"name": texts, "keep": st.lists(texts, max_size=2)}, optional={"limits": anything})
    right = st.fixed_dictionaries(
        {
            "schema": st.just(1),
            "name": texts,
            "method": texts,
            "format": texts,
            "recipe": recipes,
            "base": bases,
            "group_size": st.just(128),
            "quantized": st.lists(texts, max_size=2),
            "layers": st.one_of(st.just([]), st.lists(anything, max_size=2)),
            "versions": st.dictionaries(texts, texts, max_size=2),
            "files": st.dictionaries(file_names, file_entries, max_size=3),
        }
    )
    texts_of = st.one_of(right.map(as_json), among(MANIFEST_KEYS).map(as_json), st.binary(max_size=60))

    @holds(examples, texts_of)
    def reads(data: bytes) -> None:
        (tmp_path / "mmq.json").write_bytes(data)
        for verify in (False, True):
            found = result(lambda verify=verify: open_artifact(tmp_path, verify=verify))
            if found is not None:
                assert set(found.manifest["files"]) <= {"config.json"}  # the one that is there
                assert not verify or not found.manifest["files"]  # and whose hash is not sixty-four zeros
                assert found.digest
                assert isinstance(found.format, str)


YAML_WORDS = st.text("abz{}[]:,-?&*!|>'\"%@`#~ \n\t0123456789.<=", max_size=40)
RECIPE_KEYS = list(Recipe.__dataclass_fields__)


@often
def test_recipes_are_read_or_refused(examples: int) -> None:
    import yaml

    def dumped(data: Any) -> str:
        try:
            return yaml.safe_dump(data, allow_unicode=True)
        except (yaml.YAMLError, ValueError, UnicodeError):
            return repr(data)[:300]

    usual = st.fixed_dictionaries({"name": texts, "model": texts}, optional={"samples": st.integers(0, 200)})
    limits = st.dictionaries(st.sampled_from(["mean_kl", "top1", "soft_kl", "p99_kl"]), plain, max_size=3)
    whole = st.builds(lambda *parts: {k: v for p in parts for k, v in p.items()}, usual, among(RECIPE_KEYS, plain))
    limited = st.builds(lambda one, two: {**one, "limits": two}, usual, limits)
    kinds = [
        *(one.map(dumped) for one in (whole, usual, limited, among(RECIPE_KEYS))),
        YAML_WORDS,
        YAML_WORDS.map(lambda text: f"name: a\nmodel: b\n{text}"),
        st.text(max_size=60),
    ]

    @holds(examples, st.one_of(*kinds))
    def reads(text: str) -> None:
        found = result(lambda: parse(text, where="it.yaml"))
        if found is not None:
            assert parse(show(found), where="shown") == found


MESSAGE = among(["role", "content"], st.one_of(st.sampled_from(["user", "assistant", "system"]), anything))
PART = among(["type", "text", "image", "image_url", "url"], st.one_of(st.sampled_from(["text", "image"]), plain))
ROW = among(
    ["messages", "query", "response", "history", "system", "images", "videos", "audios", "task", "id"],
    st.one_of(
        anything,
        st.lists(MESSAGE, max_size=3),
        st.builds(lambda parts: [{"role": "user", "content": parts}], st.lists(PART, max_size=3)),
        st.lists(st.sampled_from(["a.png", "none.png", "/etc/passwd", "data:image/png;base64,AAAA", "data:,x"])),
    ),
)


@often
def test_rows_are_read_or_refused(examples: int, tmp_path: Path) -> None:
    """By the reader for calibration and by the one for servers; each error names the file."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    lines = st.lists(st.one_of(ROW.map(as_json), anything.map(as_json), st.binary(max_size=40)), max_size=3)

    @holds(examples, lines.map(b"\n".join))
    def reads(data: bytes) -> None:
        file.write_bytes(data)
        for reader in (lambda: list(read(file)), lambda: asked(file)):
            result(reader, "rows.jsonl, line ")


@often
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_pictures_are_read_or_refused(examples: int, form: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((8, 8), 50).convert("RGB").save(buffer, form)
    row = json.dumps({"query": "x", "images": ["a"]}).encode()
    (tmp_path / "rows.jsonl").write_bytes(row)

    @holds(examples // 2, spoiled(buffer.getvalue()))
    def reads(data: bytes) -> None:
        (tmp_path / "a").write_bytes(data)
        result(lambda: list(read(tmp_path / "rows.jsonl")))
        result(lambda: asked(tmp_path / "rows.jsonl"))


@often
def test_an_index_is_read_or_refused(examples: int, tmp_path: Path) -> None:
    folder = hostile.model(tmp_path / "model")
    names = st.one_of(st.sampled_from(["model.safetensors", "../model.safetensors", "sub/model.safetensors"]), anything)
    maps = st.dictionaries(texts, names, max_size=3)

    @holds(examples, st.one_of(maps.map(lambda one: {"weight_map": one}), among(["weight_map", "metadata"])))
    def reads(index: Any) -> None:
        (folder / hostile.INDEX).write_bytes(as_json(index))
        if (found := result(lambda: read_subject(folder))) is not None:
            assert set(index["weight_map"].values()) == {"model.safetensors"}
            assert found.tensors
