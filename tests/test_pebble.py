"""pebble: its splits, its training-time forward pass against transformers' own, its tokenizer, its answers."""

import copy
import hashlib
import io
from random import Random

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmq.recipes.calibration import CALIBRATIONS, drawn, text
from mmq.recipes.pebble import batches, draw, model_folder, network, outliers
from mmq.recipes.pebble.measure import answers, rounded, rounding_loss, scores
from mmq.recipes.pebble.tasks import SPLITS, TASKS, belongs, conversation, exact, sample, samples


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(model_folder(), dtype=torch.float32).eval()


def _bytes(s) -> bytes:
    """Everything a sample says and shows."""
    out = io.BytesIO(repr((s.messages, s.task)).encode())
    out.seek(0, io.SEEK_END)
    for image in [*s.images, *(frame for video in s.videos for frame in video)]:
        out.write(image.tobytes())
    return out.getvalue()


def test_every_key_belongs_to_one_split():
    for i in range(2000):
        assert sum(belongs(f"key {i}", split) for split in SPLITS) == 1


def test_no_picture_or_text_is_in_two_splits():
    """What is drawn in one split is never drawn in another, wherever it stands and however large."""
    keys: dict[str, set[str]] = {}
    for split in SPLITS:
        found = keys.setdefault(split, set())
        for i in range(400):
            rng = Random(f"{split} {i}")
            kind, task = rng.choice([(k, t) for t, (kinds, _) in TASKS.items() for k in kinds])
            said = conversation(rng, kind, (168, 168), split, [task], zh=[i % 2 == 0])
            found.update(draw.content(spec) for spec in said.specs)
            if not said.specs:
                found.update(turn.question for turn in said.turns)
    names = list(SPLITS)
    for one, other in [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]:
        assert len(keys[one]) > 100
        assert not keys[one] & keys[other]


def test_place_and_size_do_not_change_the_split():
    spec = draw.scene(Random(1), (112, 112))
    moved = draw.Scene(
        tuple(draw.Shape(s.kind, s.colour, s.size, s.cell, (9, 9)) for s in spec.shapes), spec.background
    )
    larger = draw.Scene(moved.shapes, spec.background, (224, 224))
    assert draw.content(spec) == draw.content(moved) == draw.content(larger)


def test_same_seed_same_bytes_other_seed_other_bytes():
    def digest(seed: int) -> str:
        return hashlib.sha256(b"".join(map(_bytes, samples("test", 52, seed=seed)))).hexdigest()

    assert digest(3) == digest(3) != digest(4)


def test_tasks_and_languages_take_turns():
    got = list(samples("test", 2 * len(TASKS)))
    assert [s.task for s in got] == 2 * list(TASKS)
    assert any("一" <= letter <= "鿿" for s in got[len(TASKS) :] for letter in s.answer or "")
    assert all(exact(s, f" {s.answer}\n") and not exact(s, "something else") for s in got)


def test_places_match_media():
    for s in samples("train", 130, turns=3):
        parts = [part["type"] for m in s.messages for part in m["content"]]
        assert parts.count("image") == len(s.images)
        assert parts.count("video") == len(s.videos)


@pytest.mark.parametrize(("split", "tasks"), [("nowhere", None), ("test", ["juggling"])])
def test_unknown_split_or_task_is_named(split, tasks):
    with pytest.raises(ValueError, match=r"nowhere|juggling"):
        next(samples(split, 1, tasks=tasks))


def test_calibration_sets():
    some = drawn(80, seed=1)
    assert len(some) == 80
    assert 0.7 <= sum(bool(s.images) for s in some) / 80 <= 0.8
    assert not any(s.images or s.videos for s in text(20))
    assert all(s.answer for s in some)
    assert max(max(image.size) for s in drawn(8, size=448) for image in s.images) == 448
    assert set(CALIBRATIONS) == {"drawn", "text"}


CASES = [("several", (168, 112), "several"), ("clip", (112, 140), "motion"), ("document", (224, 168), "document")]


@pytest.mark.parametrize(("kind", "canvas", "task"), CASES)
def test_training_pass_equals_transformers(kind, canvas, task, model, processor):
    """Tokens, positions, patches and logits of the training code are those of the processor and the model."""
    said = conversation(Random(3), kind, canvas, "train", [task, task], zh=[False, True])
    s = sample(said)
    theirs = processor(
        text=[processor.apply_chat_template(s.messages, tokenize=False)],
        images=list(s.images) or None,
        videos=[list(video) for video in s.videos] or None,
        return_tensors="pt",
    )
    cells = canvas[0] * canvas[1] // 28**2
    spoken = "".join(f"{asked}{answered}\n" for asked, answered in batches.render(said, cells))
    ids = processor.tokenizer(spoken, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs["input_ids"])

    pads = (model.config.image_token_id, model.config.video_token_id)
    grids = [(2 if kind == "clip" else 1, canvas[1] // 28, canvas[0] // 28)] * len(said.specs)
    places = torch.from_numpy(network.positions(ids[0].numpy(), grids, pads))
    wanted, _ = model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], **{k: v for k, v in theirs.items() if "grid" in k}
    )
    assert torch.equal(places, wanted[:, 0])

    made = batches.stacked(*batches.pixels(said))
    mine = network.patches(made["frames"][made["pairs"]])
    pixels = theirs["pixel_values_videos" if kind == "clip" else "pixel_values"]
    assert (mine.reshape(pixels.shape) - pixels).abs().max() < 1e-5

    seen = torch.isin(ids[0], torch.tensor(pads)).nonzero()[:, 0]
    batch = {"ids": ids, "places": places[:, None], "seen": seen, "at": torch.arange(ids.shape[1]), **made}
    with torch.inference_mode():
        out = network.logits(dict(model.named_parameters()), model.config, batch, dtype=torch.float32)
        assert (out - model(**theirs).logits[0]).abs().max() < 1e-3


def test_a_batch_is_the_same_each_time_and_labels_are_the_answers(processor):
    words = model_folder() / "tokenizer.json"
    one, two = (batches.batch(5, seed=2, rows=8, tokenizer=words) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    ids = one["ids"].reshape(-1)
    assert torch.equal(ids[one["at"] + 1], one["labels"])
    assert (one["labels"] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == len(one["task"])


@pytest.mark.parametrize(
    "said",
    [
        "The red circle is in the top left.",
        "右下角有一个小的蓝色星形。",
        "深圳，𠮷野家 émoji 🙂\n\ttab  two",
        "0123456789",
    ],
)
def test_tokenizer_round_trip(said, processor):
    ids = processor.tokenizer(said).input_ids
    assert processor.tokenizer.decode(ids) == said
    assert max(ids) < 2048


def test_size_on_disk():
    assert (model_folder() / "model.safetensors").stat().st_size <= 12_000_000
    assert sum(path.stat().st_size for path in model_folder().iterdir()) <= 12_500_000


def test_widths_suit_int4_kernels(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            assert module.in_features % 128 == 0, name
            assert module.out_features % 128 == 0, name


def test_outlier_channels_change_no_bit_and_cost_rounding(processor):
    """Powers of two: the rescaled model gives the very same logits, and plain int4 rounding of it is worse."""
    half = AutoModelForImageTextToText.from_pretrained(model_folder(), dtype=torch.bfloat16).eval()
    wilder = copy.deepcopy(half)
    outliers.spread(wilder, seed=7)
    batch = batches.batch(0, seed=1, rows=4, tokenizer=model_folder() / "tokenizer.json", split="test")
    ids = batch["ids"][:, 80:]  # past the pictures' places
    with torch.inference_mode():
        assert torch.equal(half(input_ids=ids).logits, wilder(input_ids=ids).logits)
    assert rounding_loss(wilder, [batch])["mean_kl"] > rounding_loss(half, [batch])["mean_kl"]


def test_plain_rounding_is_visible(model):
    words = model_folder() / "tokenizer.json"
    lost = rounding_loss(model, [batches.batch(i, seed=1, rows=16, tokenizer=words, split="test") for i in range(2)])
    assert lost["mean_kl"] > 0.005
    assert lost["top1_agreement"] > 0.9


def test_rounding_keeps_sixteen_levels_a_group():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    coarse = rounded(weight)
    assert max(len(group.unique()) for group in coarse.view(-1, 128)) <= 16
    spread = weight.view(8, 2, 128).amax(-1) - weight.view(8, 2, 128).amin(-1)
    assert ((coarse - weight).view(8, 2, 128).abs().amax(-1) <= spread / 15 * 0.51 + 1e-6).all()


def test_exact_answers_on_the_test_split(processor):
    """At least 95% of held-out questions are answered to the letter, in the precision the weights are saved in."""
    asked = list(samples("test", 10 * len(TASKS), seed=11))
    half = AutoModelForImageTextToText.from_pretrained(model_folder(), dtype=torch.bfloat16).eval()
    table = scores(asked, answers(half, processor, asked))
    right = sum(row[language][0] for row in table.values() for language in row)
    assert right / len(asked) >= 0.95, table


def test_without_its_picture_the_answer_changes(model, processor):
    asked = list(samples("test", 8, seed=5, tasks=["colour", "describe"]))
    blind = [
        type(s)([{"role": m["role"], "content": [p for p in m["content"] if p["type"] == "text"]} for m in s.messages])
        for s in asked
    ]
    assert all(a != b for a, b in zip(answers(model, processor, asked), answers(model, processor, blind), strict=True))
