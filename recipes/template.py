"""Chat templates tried out before they are used: they are small programs of whoever made the model.

transformers and vLLM render them in Jinja's sandbox, which lets no template reach Python, the files or the network. It
bounds neither time nor memory: a template may loop for years and multiply a letter into gigabytes. So each is rendered
once, over a few short conversations, in a process that may take neither. What it does with other words nobody can know.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .plain import object_of, read_bytes, read_json
from .remote import TEMPLATES

LONGEST = 1 << 20  # bytes of a template; the longest of released models have some 20,000
SECONDS = 5  # of a processor; usual templates take milliseconds
MEMORY = 1 << 30  # bytes
TEXT = 1 << 22  # characters made of a conversation of a hundred

# As transformers sets its environment up (utils/chat_template_utils.py); run by itself, so it imports nothing of ours.
_PROBE = """
import json, sys
asked = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
except ImportError:
    pass
import datetime
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)
    def _same(self, caller):
        return caller()

def refuse(message):
    raise jinja2.TemplateError(message)

def tojson(x, **options):
    return json.dumps(x, ensure_ascii=False)

told = ""
for text in asked["templates"]:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        template = env.from_string(text)
    except Exception:
        continue
    for messages in asked["conversations"]:
        made = 0
        try:
            words = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
            for piece in template.generate(messages=messages, add_generation_prompt=True, **words):
                made += len(piece)
                if made > asked["text"]:
                    raise MemoryError
        except SecurityError as e:
            told = "security"
        except MemoryError:
            told = "memory"
        except Exception:
            pass
        if told:
            break
print(told or "fine")
"""
_WORDS = {"role": "user", "content": "What is in the picture?"}
_PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
_SYSTEM = {"role": "system", "content": "Answer in a word."}
_ANSWER = {"role": "assistant", "content": "A house."}
_CONVERSATIONS = ([_WORDS], [_PARTS], [_SYSTEM, _WORDS, _ANSWER, _WORDS], [_PARTS, _ANSWER, _WORDS])


def templates_of(folder: Path) -> tuple[str, ...]:
    """The chat templates in every place that engines look for them. OSError and ValueError as the files give it."""
    found: list[Any] = []
    for path in (folder / "chat_template.jinja", *sorted(folder.glob(f"{TEMPLATES}/*.jinja"))):
        if path.is_file():
            found.append(read_bytes(path, most=LONGEST).decode("utf-8", "replace"))
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file():
            said = object_of(read_json(folder / name), where=str(folder / name)).get("chat_template")
            for one in said if isinstance(said, list) else said.values() if isinstance(said, dict) else [said]:
                found.append(one.get("template") if isinstance(one, dict) else one)
    return tuple(dict.fromkeys(text for text in found if isinstance(text, str)))


def check_templates(folder: Path) -> None:
    """ValueError for a chat template that is endless, fills the memory, or reaches for what the sandbox forbids."""
    if (templates := templates_of(folder)) and (wrong := _tried(templates)):
        raise ValueError(
            f"{folder}: its chat template {wrong}; do not use this model, or put a template of your own there"
        )


@functools.lru_cache
def _tried(templates: tuple[str, ...]) -> str:
    """What is wrong with one of them, "" where nothing is."""
    if any(len(text) > LONGEST for text in templates):
        return f"has more than {LONGEST} characters"
    asked = {"templates": templates, "conversations": _CONVERSATIONS}
    asked |= {"seconds": SECONDS, "memory": MEMORY, "text": TEXT}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=12 * SECONDS,  # of a busy machine
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS} s"
    told = done.stdout.decode().strip()
    if told == "fine":
        return ""
    if told == "security":
        return "reaches for what a template may not have (Python's own attributes)"
    if told == "memory" or b"MemoryError" in done.stderr:
        return f"makes more than {MEMORY >> 30} GiB, or {TEXT} characters, of a short conversation"
    if done.returncode < 0:  # by SIGXCPU or SIGKILL
        return f"does not end within {SECONDS} s"
    raise RuntimeError(f"chat templates cannot be tried out: {done.stderr.decode('utf-8', 'replace').strip()[-300:]}")
