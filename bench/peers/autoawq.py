"""AutoAWQ 0.2.9 on the job's pictures and text, with its own defaults: duo scaling, 20 ratios, clipping, float16.

Its calibration takes text alone, cut into blocks of one length. Here the whole model meets each sample instead, up to
its first decoder layer; from there on AutoAWQ's own search runs over all samples' tokens, none padded, none dropped.
Runs in AutoAWQ's environment (requirements/backends/autoawq.txt): python autoawq.py JOB.json
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:] = [*sys.path[1:], str(Path(__file__).resolve().parent.parent)]  # packages before the scripts of their names

from peers.job import Job, Times, Watch, inputs, main  # noqa: E402
from peers.older import readable  # noqa: E402


def run(job: Job) -> Times:
    if job.method != "awq":
        raise ValueError(f"method {job.method!r}: autoawq knows awq alone")
    if job.symmetric:
        raise ValueError("autoawq packs no symmetric weights in the format that engines read (version gemm)")
    from awq import AutoAWQForCausalLM

    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        model = AutoAWQForCausalLM.from_pretrained(str(readable(job.model, Path(scratch))))
        load = watch.read()
        samples = inputs(model.processor, job)
        watch.read()
        config = {"zero_point": True, "q_group_size": job.group_size, "w_bit": 4, "version": "GEMM"}
        model.quantize(None, quant_config=config, calib_data=samples, quantizer_cls=quantizer())
        seconds = watch.read()
        layers = len(model.get_model_layers(model.model))
        model.save_quantized(str(job.out))
    return Times(load, seconds, watch.read(), layers)


def quantizer() -> type:
    """AutoAWQ's quantizer with another start: what the samples look like in front of the first decoder layer."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.utils import get_best_device

    class Caught(Exception):
        """The first decoder layer was reached: no need to go on."""

    class Quantizer(AwqQuantizer):
        def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, dict[str, Any], Any]:
            """The layers, their keyword arguments and their first inputs [1, tokens of all samples, width]."""
            layers, device = self.awq_model.get_model_layers(self.model), get_best_device()
            self.model.to(device)
            hidden, turns = [], []

            def catch(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden.append(args[0] if args else kwargs["hidden_states"])
                turns.append(kwargs["position_embeddings"])
                raise Caught

            hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
            for sample in self.calib_data:
                with suppress(Caught):
                    self.model(**{k: v.to(device) for k, v in sample.items()}, use_cache=False)
            hook.remove()
            self.model.to("cpu")
            self.lengths = [h.shape[1] for h in hidden]
            # cos and sin [..., tokens, width of a head]: joined along the tokens, as the samples are
            rotary = tuple(torch.cat([t[i] for t in turns], dim=-2) for i in range(2))
            return layers, {"position_embeddings": rotary, "attention_mask": None}, torch.cat(hidden, dim=1)

        @torch.no_grad()
        def _module_forward(self, x: Any, module: Any, module_kwargs: dict[str, Any]) -> Any:
            """One sample after another where positions matter (attention, a whole layer); all tokens at once elsewhere.

            With no mask, attention over a batch of one is causal by itself.
            """
            rotary = module_kwargs.get("position_embeddings")
            if rotary is None:
                return module(x)
            out = []
            for part, *angles in zip(
                x.split(self.lengths, 1), *(r.split(self.lengths, -2) for r in rotary), strict=True
            ):
                done = module(part, **{**module_kwargs, "position_embeddings": tuple(angles)})
                out.append(done[0] if isinstance(done, tuple) else done)
            return torch.cat(out, dim=1)

        def _get_input_feat(self, layer: Any, named_linears: dict[str, Any]) -> dict[str, Any]:
            """Each linear's inputs [1, tokens, width] on the CPU; the layer's outputs become the next one's inputs."""
            found: dict[str, list[Any]] = {name: [] for name in named_linears}
            hooks = [
                linear.register_forward_hook(lambda m, x, y, name=name: found[name].append(x[0].cpu()))
                for name, linear in named_linears.items()
            ]
            self.inps = self._module_forward(self.inps, layer, self._sanitize_kwargs(self.module_kwargs, layer))
            for hook in hooks:
                hook.remove()
            return {name: torch.cat(parts, dim=1) for name, parts in found.items()}

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *args: Any) -> Any:
            """AutoAWQ puts the weights back from `state_dict()` moved to the CPU: on a CPU that is no copy, and each
            ratio would start from weights that the last one scaled. Here it gets copies."""
            plain = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in plain().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
            finally:
                del module2inspect.state_dict

    return Quantizer


def version() -> str:
    from importlib.metadata import version

    return version("autoawq")


if __name__ == "__main__":
    main("autoawq", version, run)
