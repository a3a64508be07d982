"""Whether an engine loads a checkpoint, told before it is started: rules, what they find, and the verdict.

A rule is a function from a subject and a setting to findings. The engines' tables are in vllm.py and its
neighbours; here are the nouns, the rules that several engines share, and the judge. Imports no engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ...export.names import shards
from ...export.subject import Linear, Subject
from ...recipes.sizes import count_of

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenization_internlm2.py", "merges.txt")
INPUTS_SPLIT = ("o_proj", "down_proj", "w2", "wo", "out_proj", "dense_4h_to_h", "c_proj")  # "row parallel"
ROUTERS = re.compile(r"\.(gate|router|shared_expert_gate)$")  # never quantized, in any engine
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# model types whose configuration or processor is the checkpoint's own code: transformers 5.19 has none
REMOTE_TYPES = frozenset(
    {
        "minicpmv",
        "minicpmo",
        "internvl_chat",
        "phi3_v",
        "phi4mm",
        "internlm2",
        "internlm3",
        "ovis",
        "deepseek_vl_v2",
        "kimi_vl",
        "molmo",
    }
)


@dataclass(frozen=True)
class Setting:
    """How the checkpoint is to be run: tensor parallel size, where, by which version ("" where it is not installed
    here), the packages beside it (empty where they are not known), and whether the CPU has AMX (None: not known)."""

    tp: int = 1
    device: str = "cuda"
    version: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    amx: bool | None = None


@dataclass(frozen=True)
class Finding:
    """What one rule has to say: `fatal` where the engine would not load the checkpoint or load it wrongly, else a
    condition that has to be met. `why` names the first offender and their count, `remedy` what to do."""

    rule: str
    fatal: bool
    why: str
    remedy: str


Rule = Callable[[Subject, Setting], Iterable[Finding]]


@dataclass(frozen=True)
class Place:
    """One row of the answer: an engine on a kind of device or with one of its backends, the version whose sources the
    rules were read in, and the rules."""

    engine: str
    where: str
    seen: str
    rules: tuple[Rule, ...]
    device: str = "cuda"

    @property
    def name(self) -> str:
        return f"{self.engine}:{self.where}"


@dataclass(frozen=True)
class Verdict:
    """`answer` is yes, no or condition."""

    place: Place
    findings: tuple[Finding, ...]

    @property
    def answer(self) -> str:
        if any(f.fatal for f in self.findings):
            return "no"
        return "condition" if self.findings else "yes"


def judge(subject: Subject, place: Place, setting: Setting) -> Verdict:
    """Every rule of `place` on `subject`, none cut short by another's finding."""
    return Verdict(place, tuple(f for rule in place.rules for f in _found(rule, subject, setting)))


def _found(rule: Rule, subject: Subject, setting: Setting) -> Iterator[Finding]:
    """What one rule finds; a list of names that the engine would read as expressions, and cannot, is a finding too."""
    try:
        yield from rule(subject, setting)
    except re.error as e:
        why = f"{str(e.pattern)!r} in its lists is read as an expression, and is none: {e.msg}"
        yield Finding("lists", True, why, "`mmq convert FOLDER --repair` writes the lists anew")


# What rules are made of.


def first_of(names: Iterable[str]) -> str:
    """`a.b.c` or `a.b.c and 11 more`."""
    found = list(names)
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"


def fused_groups(subject: Subject) -> Iterator[tuple[Linear, ...]]:
    """Each set of linears that engines fuse into one and of which the checkpoint has all."""
    seen: set[str] = set()
    for name in subject.linears:
        names = shards(name)
        if name not in seen and len(names) > 1 and all(n in subject.linears for n in names):
            seen.update(names)
            yield tuple(subject.linears[n] for n in names)


def matches(entry: str, name: str) -> bool:
    """compressed-tensors' own match: the whole name, or `re:` and an expression from its start."""
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; past all others for what is built from a copy without tags (0.1.dev1)."""
    if version.startswith("0.1.dev"):
        return (1 << 16, 0)
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def per_rank(subject: Subject, linear: Linear, tp: int) -> tuple[float, float]:
    """One rank's (inputs, outputs) of a linear; keys and values are repeated where there are fewer heads than ranks."""
    leaf = linear.name.rpartition(".")[2]
    if leaf in INPUTS_SPLIT:
        return linear.inputs / tp, linear.outputs
    pairs = count_of(subject.text.get("num_key_value_heads"))
    if leaf in ("k_proj", "v_proj") and 0 < pairs < tp:
        return linear.inputs, linear.outputs / pairs
    return linear.inputs, linear.outputs / tp


def is_expert(name: str) -> bool:
    """Whether a linear belongs to one of a mixture's routed experts, which engines keep in one fused tensor."""
    return re.search(r"\.experts\.\d+\.", name) is not None


# Rules that several engines share.


def whole(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Declared and packed must agree: a config without packed tensors, packed tensors without a config."""
    if subject.method and not subject.packed:
        why = f"config.json declares {subject.method}, but no linear in the files is packed"
        yield Finding("declared", True, why, "get the checkpoint's own weights, or take quantization_config out")
    if not subject.method and subject.packed:
        why = f"{first_of(x.name for x in subject.packed)} are packed, but config.json has no quantization_config"
        yield Finding("declared", True, why, "get the checkpoint's own config.json, or quantize again")


def fused_alike(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Linears that become one must be packed all or none, in groups of one size."""
    half = [g for g in fused_groups(subject) if len({x.packed for x in g}) > 1]
    if half:
        left = [x.name for g in half for x in g if not x.packed]
        why = f"{first_of(left)} in 16 bit, but what is fused with it is packed"
        yield Finding("fused", True, why, "quantize again: q/k/v and gate/up go together")
    mixed = [g[0].name for g in fused_groups(subject) if all(x.packed for x in g) and len({x.group for x in g}) > 1]
    if mixed:
        why = f"{first_of(mixed)}: fused linears with groups of different sizes"
        yield Finding("fused", True, why, "quantize again with one group size")


def heads_divide(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Attention heads are dealt out to the ranks."""
    heads = count_of(subject.text.get("num_attention_heads"))
    if heads and heads % setting.tp:
        why = f"{heads} attention heads cannot be dealt to {setting.tp} GPUs"
        yield Finding("heads", True, why, f"--tp of a divisor of {heads}")
    pairs = count_of(subject.text.get("num_key_value_heads"))
    if pairs and pairs % setting.tp and setting.tp % pairs:
        why = f"{pairs} key-value heads cannot be dealt or repeated to {setting.tp} GPUs"
        yield Finding("heads", True, why, f"--tp that divides {pairs} or is a multiple of it")


def files_there(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """What lies beside the weights: tokenizer, processor, chat template, the checkpoint's own code."""
    if not any(name in subject.files for name in TOKENIZERS):
        yield _missing("the tokenizer (tokenizer.json or tokenizer.model)", fatal=True)
    if subject.vision and not any(name in subject.files for name in PROCESSORS):
        own = str(subject.config.get("model_type")) in REMOTE_TYPES  # whose code may need none
        yield _missing("the picture processor (preprocessor_config.json or processor_config.json)", fatal=not own)
    absent = sorted(subject.remote_files - subject.files)
    if absent:
        yield _missing(f"{', '.join(absent)}, which an auto_map names", fatal=True)
    if not _has_template(subject):
        why = "no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
        yield Finding("files", False, why, "copy the base's file; without it only /v1/completions answers")


def remote_code(subject: Subject, setting: Setting) -> Iterator[Finding]:
    """Whose own Python has to run."""
    if str(subject.config.get("model_type")) in REMOTE_TYPES:
        why = f"model type {subject.config['model_type']} brings its own Python for its config or processor"
        yield Finding("remote code", False, why, "read it, then serve with --trust-remote-code")


def _missing(what: str, *, fatal: bool) -> Finding:
    return Finding("files", fatal, f"missing beside the weights: {what}", "copy it from the base checkpoint")


def _has_template(subject: Subject) -> bool:
    if subject.files & {"chat_template.jinja", "chat_template.json"}:
        return True
    for name in ("tokenizer_config.json", "processor_config.json"):
        if name in subject.files and '"chat_template"' in (subject.folder / name).read_text(encoding="utf-8"):
            return True
    return False


def disagreement(
    engine: str, believed: Callable[[str], bool], subject: Subject, where: str, *, sure: bool = True
) -> Iterator[Finding]:
    """Where what the engine believes to be packed, by its list `where`, is not what is packed. Not `sure`, where mmq
    does not know the engine's names of this model class: it is then a condition."""
    lost = [x.name for x in subject.linears.values() if x.packed and not believed(x.name)]
    wanted = [x.name for x in subject.linears.values() if not x.packed and believed(x.name)]
    repair = "`mmq convert FOLDER --repair` writes a list that every engine reads alike"
    if lost:
        why = f"{engine} reads {where} so that {first_of(lost)} would be in 16 bit, and it is packed"
        yield Finding("skip list", sure, why, repair)
    if wanted:
        why = f"{engine} reads {where} so that {first_of(wanted)} would be packed, and it is in 16 bit"
        yield Finding("skip list", sure, why, repair)
