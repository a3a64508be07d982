"""A dataset through Ray Data's LLM batches: vLLM engines on the machines of a Ray cluster, one for each replica.

The engines, their feeding and what happens when a machine goes are Ray's; here rows become Ray's, and its answers lines
of the same file that `dataset` writes. Each machine needs the same Python environment and sees the same files. Ray is
imported on use.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..recipes.progress import Tell, silent
from .client import Answer
from .dataset import check_dataset, recorded
from .engines import plan
from .flags import Launch, parsed, settings, spelled, switched
from .machine import this_machine
from .parallel import SIZES
from .questions import Line, question_of, read_lines
from .request import DEFAULT, RequestConfig
from .target import servable

LOCAL = "local"  # a Ray that is started on this machine for the run
ROWS = 32  # in a batch for an engine, which takes the next before the last one's end
OF_A_SERVER = ("host", "port", "served_model_name", "middleware", "allowed_media_domains", "shutdown_timeout")
FLAG = re.compile(r"-\D")  # and no number below 0
SHORT = {"-q": "--quantization", "-cc": "--compilation-config", **{short: flag for _, flag, short, _ in SIZES}}
OF_A_GUARD = ("PYTHONPATH", "MMQ_GUARD", "VLLM_MEDIA_URL_ALLOW_REDIRECTS")
OF_A_ROW = ("mm_processor_kwargs",)  # of a request's extra: what is no sampling parameter
# a loop over a message's parts: such a template wants parts, others text with placeholders in it
PARTS = re.compile(r"for\s+\w+\s+in\s+(?:\w+\s*(?:\.content\b|\[\s*['\"]content['\"]\s*\])|content\b)")


def infer_on_ray(
    target: str,
    sources: Sequence[str | Path],
    out: Path,
    config: RequestConfig = DEFAULT,
    *,
    address: str = LOCAL,
    replicas: int = 1,
    system: str | None = None,
    overwrite: bool = False,
    hub: str = "hf",
    revision: str | None = None,
    engine: str = "vllm",
    extra: Sequence[str] = (),
    tell: Tell = silent,
    **options: Any,
) -> dict[str, float]:
    """As `infer_dataset`, with `replicas` vLLM engines on the Ray cluster at `address` ("local" for one that is started
    here, "auto" for the one that runs here, HOST:PORT) in place of a server.

    The engines' settings are the plan's for this machine; flags in `extra` win over them. ValueError for a broken
    input, OSError where Ray or a vLLM that it knows is not installed, RuntimeError when the cluster gives up.
    """
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}; it must be at least 1")
    if config.stream:
        raise ValueError("answers from a cluster come in no order: --stream does not go with --ray")
    check_installed()
    asked = check_dataset(sources, out, system=system, overwrite=overwrite)
    folder, name = servable(target, hub=hub, revision=revision, tell=tell)
    launch = plan(engine, folder, machine=this_machine(), served_model_name=name, extra=extra, **options)
    with recorded(asked, out, launch.name, config, overwrite=overwrite, tell=tell) as (keep, done, figures):
        rows = [
            {"index": index, "file": str(line.file.resolve()), "number": line.number, "data": json.dumps(line.data)}
            for index, line in enumerate(read_lines(sources))
            if index not in done
        ]
        for index, found in _answers(rows, folder, launch, config, address, replicas, system) if rows else ():
            keep(index, found)
    return figures


def check_installed() -> None:
    """OSError with the line that mends it where Ray, or a vLLM that it knows, is not installed here."""
    remedy = "`pip install '.[ray]'` in mmq's folder, into an environment of its own, for Ray names the version of vLLM"
    if importlib.util.find_spec("ray") is None:
        raise OSError(f"--ray needs Ray Data's LLM batches: {remedy}")
    try:
        importlib.import_module("ray.data.llm")
    except ImportError as e:
        raise OSError(f"Ray is here without what its LLM batches need ({e}): {remedy}") from None
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("vllm.entrypoints.chat_utils") is None:
        raise OSError(f"Ray's LLM batches need a vLLM of their own choice beside them: {remedy}")


def engine_settings(launch: Launch) -> tuple[dict[str, Any], dict[str, str]]:
    """(vLLM's engine arguments, variables) that say what the launch of a server says, without what is a server's."""
    words = launch.argv[launch.argv.index("serve") + 2 :] if "serve" in launch.argv else launch.argv[1:]
    found: dict[str, Any] = {}
    for at, word in enumerate(words):
        if not FLAG.match(word):
            continue
        name = spelled(word)
        if not name.startswith("--") and name not in SHORT:
            raise ValueError(f"{word} after -- is not known to --ray; write it in its long form")
        head, equals, value = word.partition("=")
        values = [value] if equals else list(itertools.takewhile(lambda word: not FLAG.match(word), words[at + 1 :]))
        if "." in head:
            said: Any = settings(words, name)
        elif values:
            said = parsed(values[0]) if len(values) == 1 else [parsed(value) for value in values]
        else:
            said = switched([word], name)
        found[SHORT.get(name, name)[2:].replace("-", "_")] = said
    found = {flag: value for flag, value in found.items() if flag not in OF_A_SERVER}
    return found, {key: value for key, value in launch.env.items() if key not in OF_A_GUARD}


def content_format(folder: Path) -> str:
    """ "openai" where the model's chat template goes over a message's parts, "string" where it wants one text."""
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*chat_template*") if path.is_file()]
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        texts.append(str(json.loads(tokenizer.read_text(encoding="utf-8")).get("chat_template") or ""))
    return "openai" if any(PARTS.search(text) for text in texts) else "string"


def before(row: dict[str, Any], *, config: RequestConfig, system: str | None) -> dict[str, Any]:
    """Ray's row of ours, on the machine that sends it: the messages with their files, and how they are answered."""
    question = question_of(Line(Path(row["file"]), row["number"], json.loads(row["data"])), system=system)
    how = config.options()
    body = how.pop("extra_body", {})
    body.pop("media_io_kwargs", None)  # the engine's own setting here
    logprobs = {"logprobs": how.pop("top_logprobs", 0)} if how.pop("logprobs", False) else {}
    sampling = {**how, **logprobs, **{key: value for key, value in body.items() if key not in OF_A_ROW}}
    more = {key: body[key] for key in OF_A_ROW if key in body}
    return {"index": row["index"], "messages": list(question.messages), "sampling_params": sampling, **more}


def after(row: dict[str, Any], *, most: int) -> dict[str, Any]:
    """Our row of Ray's answer; a JSON text, so that rows of all shapes go into one table."""
    chosen = zip(row["generated_tokens"], row.get("logprobs") or (), strict=False)
    found = {
        "text": row["generated_text"],
        "prompt_tokens": int(row["num_input_tokens"]),
        "tokens": int(row["num_generated_tokens"]),
        # Ray does not say why an answer ended
        "finish": "length" if row["num_generated_tokens"] >= most else "stop",
        "seconds": float(row.get("time_taken_llm") or 0.0),
        "logprobs": [_logprob(int(token), place) for token, place in chosen] or None,
    }
    return {"index": row["index"], "found": json.dumps(found)}


def _logprob(token: int, place: dict[Any, Any]) -> dict[str, Any]:
    """OpenAI's form of the log-probabilities of one place; `place` is token -> {logprob, rank, decoded_token}."""
    told = {
        int(other): {"token": said.get("decoded_token") or "", "logprob": float(said["logprob"])}
        for other, said in place.items()
        if said
    }
    return {**told[token], "top_logprobs": [said for other, said in told.items() if other != token]}


def _answers(
    rows: list[dict[str, Any]],
    folder: Path,
    launch: Launch,
    config: RequestConfig,
    address: str,
    replicas: int,
    system: str | None,
) -> Iterator[tuple[int, Answer | Exception]]:
    """(index, answer or error) as they come from the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray, data, llm = (importlib.import_module(name) for name in ("ray", "ray.data", "ray.data.llm"))
    own, variables = engine_settings(launch)
    if media := config.options().get("extra_body", {}).get("media_io_kwargs"):
        own["media_io_kwargs"] = media
    gpu = 1 if launch.device == "cuda" else 0
    little = {"num_cpus": 0.1}  # the stages before the engine mostly wait, and a small machine has to run them all
    logging.getLogger("ray").setLevel(logging.ERROR)
    start: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **start)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise OSError(f"no Ray cluster answers at {address}: {str(e).splitlines()[0]}") from None
    try:
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.issue_detectors_config.detectors = []
        processor = llm.build_processor(
            llm.vLLMEngineProcessorConfig(
                model_source=str(folder.resolve()),
                engine_kwargs=own,
                concurrency=replicas,
                batch_size=ROWS,
                should_continue_on_error=True,
                placement_group_config=None if gpu else {"bundle_per_worker": {"CPU": 1}},
                runtime_env={"env_vars": variables},
                prepare_multimodal_stage={
                    "enabled": True,
                    "chat_template_content_format": content_format(folder),
                    "apply_sys_msg_formatting": True,
                    "model_config_kwargs": _for_parts(own),
                    **little,
                },
                chat_template_stage={"enabled": True, **little},
                tokenize_stage={"enabled": False},  # the engine's own tokenizer puts the pictures' places in
                detokenize_stage={"enabled": False},
                log_engine_metrics=False,
            ),
            preprocess=partial(before, config=config, system=system),
            postprocess=partial(after, most=config.max_tokens),
            preprocess_map_kwargs=little,
            postprocess_map_kwargs=little,
        )
        blocks = max(replicas, -(-len(rows) // ROWS))
        for row in processor(data.from_items(rows, override_num_blocks=min(blocks, len(rows)))).iter_rows():
            if error := row.get("__inference_error__"):
                yield int(row["index"]), ValueError(str(error))
            else:
                yield int(row["index"]), Answer(**json.loads(row["found"]))
    except ray.exceptions.RayError as e:
        last = [line for line in str(e).splitlines() if line.strip()][-1]
        raise RuntimeError(f"the Ray cluster gave up: {last.strip()}") from None
    finally:
        ray.shutdown()


def _for_parts(own: dict[str, Any]) -> dict[str, Any]:
    """Of the engine's arguments those that decide how a message's parts are read."""
    kept = ("max_model_len", "limit_mm_per_prompt", "media_io_kwargs", "trust_remote_code", "allowed_media_domains")
    return {key: own[key] for key in kept if key in own}
