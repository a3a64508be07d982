"""Sample: one conversation with its pictures, and the readers that make samples from JSONL files and folders.

Knows no model, no chat template and no tensor: a sample is text and pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """Chat messages and their media.

    A message is {"role": str, "content": str | list of parts}. A part is {"type": "text", "text": str}, or a place
    {"type": "image"} or {"type": "video"}; places stand in the order of `images` and `videos`. The last message is
    the assistant's answer where it is known. `task` names a kind of question, for scores task by task.
    """

    messages: list[dict[str, Any]]
    images: tuple[Image, ...] = ()
    videos: tuple[Any, ...] = ()
    task: str | None = None

    @property
    def answer(self) -> str | None:
        """The text of the assistant's last message, or None where the conversation ends with a question."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        return _text(self.messages[-1]["content"])

    @property
    def question(self) -> Sample:
        """The same sample without its final answer (itself where there is none)."""
        if self.answer is None:
            return self
        return replace(self, messages=self.messages[:-1])


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
