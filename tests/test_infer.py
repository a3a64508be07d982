"""infer: one answer streamed, a dataset in and answers out, taken up where it stopped. The server is the real vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import Run

from mmq.recipes.pebble.tasks import samples
from mmq.recipes.progress import Step
from mmq.serve.crowd import in_order
from mmq.serve.dataset import check_dataset, infer_dataset
from mmq.serve.infer import answering, asking, media_flags, serving
from mmq.serve.request import InferRequest, RequestConfig, config_of
from mmq.serve.results import failed, finished, summary, write
from mmq.serve.running import Server, free_port

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
COUNT = 10
FIGURES = (
    *("num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s"),
    *("failed", "resumed"),
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A JSONL of pebble's test questions in the two forms, pictures beside it, and one with no answer."""
    lines = []
    for number, sample in enumerate(s for s in samples("test", 2 * COUNT) if not s.videos):
        names = []
        for at, image in enumerate(sample.images):
            names.append(f"{number}-{at}.png")
            image.save(tmp_path / names[-1])
        line: dict = {"messages": sample.question.messages, "images": names, "task": sample.task}
        if number % 2:
            line["messages"] = sample.messages
        lines.append(json.dumps(line, ensure_ascii=False))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines[:COUNT]) + "\n", encoding="utf-8")
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def short(tokens: int = 8, **more: object) -> RequestConfig:
    return RequestConfig(max_tokens=tokens, **more)  # type: ignore[arg-type]


@needs_vllm
def test_one_prompt_streams_or_comes_whole(served: Server, dataset: Path) -> None:
    question = InferRequest("What is in the picture?", [dataset.parent / "0-0.png"]).as_openai()
    with answering(served.url, short(24, stream=True)) as answer:
        pieces = list(answer(question))
    with answering(served.url, short(24)) as answer:
        whole = list(answer(question))
    with asking(served.url, short(24)) as ask:
        facts = ask(question).facts()
    assert len(pieces) > 1
    assert whole == ["".join(pieces)] == [facts["answer"]]
    assert facts["tokens"] > 1
    assert "logprobs" not in facts


@needs_vllm
@pytest.mark.parametrize("extra", [{"n": 3, "top_k": 50}, {"n": 3, "use_beam_search": True}])
def test_of_several_answers_the_first(served: Server, extra: dict, tmp_path: Path) -> None:
    """Streamed and whole, of one prompt and of a dataset: three that come in one stream are not mixed."""
    options = short(12, temperature=0.0 if "use_beam_search" in extra else 1.0, seed=1, extra=extra)
    question = InferRequest("你好").as_openai()
    with answering(served.url, options) as answer:
        whole = "".join(answer(question))
    with answering(served.url, replace(options, stream=True)) as answer:
        assert "".join(answer(question)) == whole
    (tmp_path / "one.jsonl").write_text('{"query": "你好"}\n', encoding="utf-8")
    infer_dataset(served.url, [tmp_path / "one.jsonl"], out := tmp_path / "out.jsonl", replace(options, stream=True))
    assert [record["answer"] for record in records(out)] == [whole]


@needs_vllm
def test_a_dataset_in_and_answers_out(served: Server, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "answers.jsonl"
    steps: list[Step] = []
    shown: list[object] = []
    options = {"tell": steps.append, "show": lambda *piece: shown.append(piece)}
    figures = infer_dataset(served.url, [dataset], out, short(16), concurrency=4, **options)
    assert not shown  # that is for a config with `stream`
    found = records(out)
    assert [r["index"] for r in found] == list(range(COUNT))
    assert [bool(r.get("reference")) for r in found] == [bool(n % 2) for n in range(COUNT)]
    assert all(r["answer"] and r["task"] and r["seconds"] > 0 and 0 < r["tokens"] <= 16 for r in found)
    assert figures["num_samples"] == COUNT
    assert figures["num_generated_tokens"] == sum(r["tokens"] for r in found)
    assert figures["num_prompt_tokens"] == sum(r["prompt_tokens"] for r in found)
    assert figures["tokens/s"] == pytest.approx(figures["num_generated_tokens"] / figures["runtime"], rel=0.02)
    assert (steps[-1].done, steps[-1].total) == (COUNT, COUNT)
    assert "tok/s" in steps[-1].note
    assert [r["source"] for r in found[:2]] == ["questions.jsonl:1", "questions.jsonl:2"]


@needs_vllm
def test_what_goes_to_stdout(served: Server, dataset: Path, mmq: Run) -> None:
    """The figures and where the answers are, no empty lines; with --json that object alone, though --stream is on."""
    words = ["infer", served.url, "--dataset", f"{dataset}#3", "--max-tokens", "4"]
    code, out, err = mmq(*words)
    assert code == 0, err
    assert [line.split()[0] for line in out.split("\n")[:-1]] == [*FIGURES, "answers:"]
    code, out, err = mmq(*words, "--json", "--stream", "--overwrite")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [*json.loads(out)] == ["result", *FIGURES]


@needs_vllm
def test_an_interrupted_run_is_taken_up(served: Server, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"

    def stop_at(count: int) -> Callable[[Step], None]:
        def tell(step: Step) -> None:
            if step.done == count:
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):
        infer_dataset(served.url, [dataset], out, short(8), concurrency=2, tell=stop_at(4))
    kept = records(out)
    assert len(kept) == 4
    with out.open("a") as file:
        file.write('{"index": 9, "sam')  # the line that was being written
    figures = infer_dataset(served.url, [dataset], out, short(8), concurrency=2)
    assert (figures["resumed"], figures["num_samples"]) == (4, COUNT - 4)
    found = records(out)
    assert [r["index"] for r in found] == list(range(COUNT))
    assert all(found[r["index"]] == r for r in kept)
    again = infer_dataset(served.url, [dataset], out, short(8))
    assert (again["resumed"], again["num_samples"], again["tokens/s"]) == (COUNT, 0, 0.0)
    assert records(out) == found
    whole = infer_dataset(served.url, [dataset], out, short(8), overwrite=True)
    assert (whole["resumed"], whole["num_samples"]) == (0, COUNT)


@needs_vllm
def test_logprobs_stand_in_the_rows(served: Server, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    infer_dataset(served.url, [f"{dataset}#3"], out, short(8))
    assert infer_dataset(served.url, [f"{dataset}#3"], out, short(8, logprobs=True))["resumed"] == 0
    for record in records(out):
        tokens = record["logprobs"]["content"]
        assert len(tokens) == record["tokens"]
        assert all(token["logprob"] <= 0 for token in tokens)
        assert "".join(token["token"] for token in tokens).startswith(record["answer"][:4])
    assert infer_dataset(served.url, [f"{dataset}#3"], out, short(8))["resumed"] == 3
    assert infer_dataset(served.url, [f"{dataset}#3"], out, short(8, logprobs=True))["resumed"] == 3


@needs_vllm
def test_one_refused_request_does_not_end_the_run(served: Server, dataset: Path, tmp_path: Path) -> None:
    lines = dataset.read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps({"query": "word " * 20000})
    dataset.write_text("\n".join(lines[:3]), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    figures = infer_dataset(served.url, [dataset], out, short(8))
    assert (figures["num_samples"], figures["failed"]) == (2, 1)
    found = records(out)
    assert failed(out) == [f"questions.jsonl:2: {found[1]['error']}"]
    assert "answer" not in found[1]
    assert "context length" in found[1]["error"] or "max_model_len" in found[1]["error"]
    assert infer_dataset(served.url, [dataset], out, short(8))["failed"] == 1  # asked again, the two others are not


@needs_vllm
def test_results_of_something_else_are_not_mixed(served: Server, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    infer_dataset(served.url, [f"{dataset}#2"], out, short(4))
    before = out.read_bytes()
    lines = dataset.read_text(encoding="utf-8").splitlines()
    dataset.write_text("\n".join(reversed(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match="answers to other samples"):
        infer_dataset(served.url, [dataset], out, short(4))
    out.write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="line 1: not a line of answers"):
        infer_dataset(served.url, [dataset], out, short(4))
    out.write_bytes(before.replace(served.name.encode(), b"another"))
    dataset.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="holds answers of another"):
        infer_dataset(served.url, [dataset], out, short(4))


@needs_vllm
def test_a_broken_input_costs_no_request(served: Server, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    whole = dataset.read_text(encoding="utf-8")
    dataset.write_text(whole + '{"messages": [', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line {COUNT + 1}: broken JSON"):
        infer_dataset(served.url, [dataset], out)
    dataset.write_text(whole, encoding="utf-8")
    picture = dataset.parent / "0-0.png"
    picture.write_bytes(picture.read_bytes()[:40])
    (dataset.parent / "3-0.png").unlink()
    with pytest.raises(ValueError, match=r"line 1: .*0-0\.png.* \(and 1 more: questions\.jsonl:4\)$"):
        infer_dataset(served.url, [dataset], out)
    for wrong in ("#0", "#-1", "#ten"):
        with pytest.raises(ValueError, match="after # comes how many rows"):
            check_dataset([f"{dataset}{wrong}"], out)
    with pytest.raises(ValueError, match="concurrency is 0"):
        infer_dataset(served.url, [dataset], out, concurrency=0)
    assert not out.exists()


def test_where_answers_may_go(dataset: Path, tmp_path: Path, mmq: Run) -> None:
    """Never onto the questions, though --overwrite is typed, nor in place of what is no file; told before an engine
    is started."""
    before = dataset.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(dataset)
    for out in (dataset, link, tmp_path / "." / dataset.name):
        code, _, err = mmq("infer", "nowhere", "--dataset", dataset, "--result-path", out, "--overwrite")
        assert (code, "is of the dataset itself" in err) == (2, True), err
    code, _, err = mmq("infer", "nowhere", "--dataset", tmp_path, "--result-path", tmp_path / "new.jsonl")
    assert (code, "is of the dataset itself" in err) == (2, True), err
    assert dataset.read_bytes() == before
    for out, why in ((tmp_path, "no plain file"), (Path("/dev/null"), "no plain file"), (dataset / "x", "File exists")):
        code, _, err = mmq("infer", "nowhere", "--dataset", dataset, "--result-path", out)
        assert (code, f"cannot be written to {out}" in err, why in err) == (2, True, True), err
    other = tmp_path / "questions-answers.jsonl"  # as it is called by default
    other.write_text('{"index": 0, "sample": "of another"}\n')
    code, _, err = mmq("infer", "nowhere", "--dataset", dataset)
    assert (code, "holds answers to other samples (line 1)" in err) == (2, True), err


def test_line_ends_within_an_answer(tmp_path: Path) -> None:
    """What Python calls a line and JSON does not: the file is taken up again, and stays where a link leads."""
    out = tmp_path / "link.jsonl"
    out.symlink_to(tmp_path / "elsewhere.jsonl")
    kept = {"index": 0, "sample": "a", "model": "m", "answer": "one\u2028two\x85three"}
    write(out, [kept, {"index": 1, "sample": "b", "model": "m", "error": "no"}])
    assert out.is_symlink()
    assert finished(out, ["a", "b"], model="m") == {0: kept}
    assert failed(out) == ["2: no"]
    with out.open("a", encoding="utf-8") as file:
        file.write('{"index": "x", "sample": "b"}\n\n')
    with pytest.raises(ValueError, match="line 3: not a line of answers"):
        finished(out, ["a", "b"])


def test_a_server_that_is_gone_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(OSError, match=r"no server answers at .* start one with `mmq serve"):
        infer_dataset(nobody, [dataset], out, model="x")
    assert not out.exists()


@needs_vllm
def test_several_datasets_and_a_system_message_streamed_in_order(served: Server, dataset: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    rows = [
        {"id": "a-1", "query": "What is in the picture?", "images": ["0-0.png"]},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "word " * 20000}]},
        {"query": "Hello", "history": [["<image>what?", "a square"]], "images": "1-0.png"},
    ]
    more.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shown: list[tuple[int, str]] = []
    options = {"system": "You are brief.", "show": lambda *piece: shown.append(piece), "concurrency": 5}
    out = tmp_path / "answers.jsonl"
    figures = infer_dataset(served.url, [f"{dataset}#2", more], out, short(12, stream=True, logprobs=True), **options)
    found = records(out)
    assert [r["source"] for r in found] == [
        "questions.jsonl:1",
        "questions.jsonl:2",
        *(f"more.jsonl:{n}" for n in "123"),
    ]
    assert found[2]["id"] == "a-1"
    assert [number for number, _ in shown] == sorted(number for number, _ in shown)
    said = ["".join(piece for number, piece in shown if number == at) for at in range(5)]
    assert said == [r.get("answer", "") + "\n" for r in found]
    assert (figures["num_samples"], figures["failed"]) == (4, 1)
    good = [r for r in found if "error" not in r]
    assert all(len(r["logprobs"]["content"]) == r["tokens"] > 1 and r["prompt_tokens"] > 10 for r in good)
    with pytest.raises(BrokenPipeError):  # as of `| head`: the reader has left, and not the server
        infer_dataset(served.url, [dataset], tmp_path / "left.jsonl", short(2, stream=True), show=_left)
    plain = infer_dataset(
        served.url, [f"{dataset}#2", more], tmp_path / "whole.jsonl", short(12), system="You are brief."
    )
    assert [r.get("answer") for r in records(tmp_path / "whole.jsonl")] == [r.get("answer") for r in found]
    assert plain["num_prompt_tokens"] == figures["num_prompt_tokens"]


def _left(number: int, piece: str) -> None:
    raise BrokenPipeError(32, "Broken pipe")


@needs_vllm
def test_a_model_that_is_not_there_is_one_error(served: Server, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no model 'lora'; it serves {served.name}"):
        infer_dataset(served.url, [dataset], tmp_path / "answers.jsonl", model="lora")
    with pytest.raises(ValueError, match="has no model"), asking(served.url, model="lora"):
        pass


def test_pieces_are_shown_in_turn() -> None:
    shown: list[tuple[int, str]] = []
    piece, end = in_order([3, 4, 7], lambda *said: shown.append(said))
    piece(4, "b")
    end(7)
    assert shown == []
    piece(3, "a")
    assert shown == [(3, "a")]
    end(3)
    piece(4, "c")
    assert shown == [(3, "a"), (3, "\n"), (4, "b"), (4, "c")]
    end(4)
    assert "".join(said for _, said in shown) == "a\nbc\n\n"


def test_what_is_sent_for_a_config() -> None:
    assert RequestConfig().options() == {"max_tokens": 512, "temperature": 0.0}
    config = config_of(extra='{"top_k": 3}', stream=None, by_default=True, top_p=0.9, seed=1, stop=("#",), fps=1.0)
    assert config.stream
    assert config.options() == {
        "max_tokens": 512,
        "temperature": 0.0,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["#"],
        "extra_body": {"top_k": 3, "media_io_kwargs": {"video": {"fps": 1.0}}},
    }
    bare, flags = media_flags("vllm", RequestConfig(fps=1, frames=16))
    assert bare == RequestConfig()
    assert json.loads(flags[1]) == {"video": {"num_frames": 16, "max_frames": 16, "fps": 1}}
    sized = RequestConfig(extra={"mm_processor_kwargs": {"max_slice_nums": 2}, "top_k": 1})
    assert media_flags("vllm", sized) == (
        RequestConfig(extra={"top_k": 1}),
        ("--mm-processor-kwargs", '{"max_slice_nums":2}'),
    )
    assert media_flags("pytorch", config) == (config, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top-p is 0"),
        ({"frames": 0}, "frames is 0"),
        ({"extra": "{"}, "--extra is no JSON"),
        ({"extra": "[1]"}, "--extra must be an object"),
        ({"extra": '{"model": "m", "messages": []}'}, "messages, model cannot be in extra"),
    ],
)
def test_a_config_that_no_server_takes(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**{"extra": None, "stream": None, "by_default": False} | settings)


def test_what_the_engine_that_is_started_is_told(
    artifact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mmq: Run,
) -> None:
    """The model's size and what media it lets in, as `mmq serve` has them; a server that runs has its own."""
    heard = tmp_path / "heard"
    engine = tmp_path / "vllm"
    engine.write_text(f'#!/bin/sh\necho "$MMQ_GUARD $*" > "{heard}"\necho "RuntimeError: no device"\nexit 1\n')
    engine.chmod(0o755)
    monkeypatch.setenv("MMQ_VLLM", str(engine))
    options = ["--media-network", "10.0.0.0/8", "--media-domain", "a.example", "--max-body", "1MiB", "--max-media", "0"]
    words = [*options, "--max-model-len", "1024", "--trust-remote-code"]
    code, _, err = mmq("infer", str(artifact("awq")), "hello", *words)
    assert (code, "no device" in err) == (3, True), err
    guard, argv = heard.read_text().split(" ", 1)
    told = {"max_body": 1 << 20, "max_media": 0, "domains": ["a.example"], "networks": ["10.0.0.0/8"]}
    assert json.loads(guard).items() >= told.items()
    assert "--max-model-len 1024" in argv
    assert "--trust-remote-code" in argv
    for wrong in (options[:2], options[6:], ["--max-model-len", "1024"]):
        code, _, err = mmq("infer", "http://127.0.0.1:1", "hello", *wrong)
        assert (code, f"{wrong[0]} is for an engine that is started here" in err) == (2, True), err
    code, _, err = mmq("infer", "pebble", "--dataset", "rows.jsonl", "--ray", "local", *options[:2])
    assert (code, "--media-network goes without --ray" in err) == (2, True), err


def test_an_address_is_served_already() -> None:
    with serving("http://127.0.0.1:8000/v1/") as url:
        assert url == "http://127.0.0.1:8000"


def test_figures_by_hand() -> None:
    answered = [{"tokens": 10, "prompt_tokens": 30}, {"tokens": 30, "prompt_tokens": 20}, {"error": "no"}]
    assert summary(answered, 4.0) == {
        "num_prompt_tokens": 50,
        "num_generated_tokens": 40,
        "num_samples": 2,
        "runtime": 4.0,
        "samples/s": 0.5,
        "tokens/s": 10.0,
        "failed": 1,
    }
    assert summary([], 0.0)["tokens/s"] == 0.0


def test_an_engine_is_started_and_ended_for_a_folder(
    artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the engine's program refuses: what `serving` starts dies, and says so
    fails = tmp_path / "vllm"
    fails.write_text("#!/bin/sh\necho 'RuntimeError: no such device'\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("MMQ_VLLM", str(fails))
    with (
        pytest.raises(RuntimeError, match="died at its start: RuntimeError: no such device"),
        serving(str(artifact("awq")), log_path=tmp_path / "log"),
    ):
        pass
    assert shutil.which("vllm", path=str(tmp_path))
