"""The PyTorch engine's program, `python -m mmq.serve.pytorch_engine FOLDER --served-model-name NAME ...`.

It is `transformers serve` of one folder under one name, with packed weights restored to 16 bit as they are loaded, LoRA
adapters beside them (pytorch_lora.py), and requests, answers and errors as the other engines have them
(pytorch_requests.py). serve starts it and never imports it: this program alone, of this room, knows torch.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from transformers.cli.serving import model_manager, server
from transformers.cli.serving.utils import Modality
from transformers.cli.transformers import app
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.video_utils import load_video

from ..export.restored import load_model
from ..quantize.classes import open_processor
from ..quantize.family import row_of
from ..quantize.skeleton import read_config
from .adapter import Adapter, read_adapter, split_name
from .inside.mmq_guard import Guard
from .pytorch_gone import heeding
from .pytorch_lora import Choice, attach
from .pytorch_own import load_own
from .pytorch_replies import failure
from .pytorch_requests import Endpoint

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")  # no other is opened
DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "opencv": "cv2"}  # of videos: transformers' name, the package's


class OneModel(model_manager.ModelManager):
    """The model of one folder under the name `force_model`, its adapters under theirs; all but `choice`, which comes
    with the model, are set before the server makes its manager."""

    folder: Path
    context: int
    packed: bool
    adapters: tuple[Adapter, ...]
    choice: Choice

    def process_model_name(self, model_id: str) -> str:  # pyright: ignore
        return model_id

    @cached_property
    def own(self) -> tuple[Any, Any] | None:
        """Model and processor by mmq's own classes, where transformers has none."""
        config = read_config(self.folder)
        if row_of(config) is None and config.get("model_type") in CONFIG_MAPPING:
            return None
        device = "cuda" if self.device == "auto" and torch.cuda.is_available() else str(self.device)
        return load_own(self.folder, device=device.replace("auto", "cpu"), trust=self.trust_remote_code)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        if self.own is not None:
            return self.own[1]
        found = open_processor(self.folder)
        if hasattr(found, "video_processor"):
            found.video_processor.fetch_videos = fetch_videos
        return found

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        quantization = self.get_quantization_config()
        more = {} if quantization is None else {"quantization_config": quantization}
        model = (
            self.own[0]
            if self.own is not None
            else load_model(
                self.folder,
                dtype=self.dtype,
                device_map=self.device,
                attn_implementation=self.attn_implementation,
                packed=self.packed,
                **more,
            )
        )
        classes = read_config(self.folder).get("architectures") or [""]
        self.choice = attach(model, self.adapters, architecture=classes[0])
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore
        now = int(time.time())
        facts = {"owned_by": "mmq", "object": "model", "created": now, "max_model_len": self.context}
        base = {"id": self.force_model, **facts, "parent": None}
        return [base, *({**base, "id": adapter.name, "parent": self.force_model} for adapter in self.adapters)]

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # pyright: ignore
        """Without ears a model is asked for no sound, which transformers would otherwise take from each video."""
        if self.own is not None:
            return Modality.VLM
        found = super().get_model_modality(model, processor)
        deaf = not hasattr(processor, "feature_extractor") and not hasattr(processor, "audio_processor")
        return Modality.VLM if found == Modality.MULTIMODAL and deaf else found


def fetch_videos(videos: Any, sample_indices_fn: Any = None) -> Any:
    """Frames and metadata of videos sent as data URLs, by whichever decoder is installed: transformers' own way takes
    paths and web addresses alone, and torchcodec alone."""
    if isinstance(videos, list):
        return list(zip(*(fetch_videos(video, sample_indices_fn) for video in videos), strict=True))
    there = [name for name, module in DECODERS.items() if importlib.util.find_spec(module)]
    if not there:
        raise ValueError(f"videos need one of {', '.join(DECODERS.values())} beside transformers; none is installed")
    data = base64.b64decode(videos.partition(",")[2])
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(data)
        file.flush()
        return load_video(file.name, backend=there[0], sample_indices_fn=sample_indices_fn)  # pyright: ignore


def built(build: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `build_server`: its handlers within ours, the routes that load other models taken out, the guard
    before it all."""

    def build_server(manager: OneModel, chat: Any, *, completion_handler: Any, **more: Any) -> Any:
        names = (manager.force_model, *(adapter.name for adapter in manager.adapters))
        shared = {"names": names, "context": manager.context, "choice": manager.choice}
        made = build(
            manager,
            Endpoint(chat, chat=True, **shared),
            completion_handler=Endpoint(completion_handler, chat=False, **shared),
            **more,
        )
        made.router.routes = [route for route in made.router.routes if getattr(route, "path", "") in ROUTES]

        @made.exception_handler(RequestValidationError)
        async def no_object(request: Any, error: Any) -> JSONResponse:
            return JSONResponse(failure("the request's body must be a JSON object", 400), 400)

        return Guard(heeding(made))

    return build_server


def main() -> None:
    """FOLDER, its name and its context; the rest of the command line is what `transformers serve` takes."""
    parser = argparse.ArgumentParser(prog="mmq.serve.pytorch_engine", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--keep-packed", action="store_true")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FOLDER")
    own, words = parser.parse_known_args()
    OneModel.folder, OneModel.context, OneModel.packed = own.folder, own.max_model_len, own.keep_packed
    OneModel.adapters = tuple(read_adapter(*split_name(item)) for item in own.lora)
    model_manager.ModelManager = OneModel  # what Serve takes from these two modules when it is called
    server.build_server = built(server.build_server)
    app(["serve", own.served_model_name, *words])


if __name__ == "__main__":
    main()
