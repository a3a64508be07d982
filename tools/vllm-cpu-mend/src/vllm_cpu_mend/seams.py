"""The mends themselves. Each looks first whether its seam is broken here, and leaves a sound installation alone.

Knows torchvision's two native libraries and the CPU's matrix tiles; knows nothing of vLLM, whose only part is to call
`ask_for_amx_tiles` in each of its processes. The fourth seam, the name in the package metadata, needs no code.
"""

import io

# torchvision's libraries keep the operators they declare for as long as the process runs; so must we.
_declared = []

# torchvision.io.ImageReadMode's values -> Pillow's modes (0 is "as it is in the file")
_PILLOW_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def declare_detection_operators(extension) -> None:
    """Declare nms and qnms, which torchvision registers shapes for whether or not its library has loaded.

    extension: the module torchvision.extension, which has just tried to load `_C.so`. PyPI's build is linked to CUDA
    libraries that a CPU torch lacks, so the load fails, nothing declares the two, and `import torchvision` ends with
    "operator torchvision::nms does not exist". A declaration without a kernel is enough: the transforms use neither,
    and a call of torchvision.ops.nms still says that the library is missing.
    """
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def decode_images_with_pillow(image) -> None:
    """Put a Pillow decoder in the place of torchvision.io's, whose `image.so` cannot load for the same reason.

    image: the module torchvision.io.image. Transformers takes `decode_image` from it to read pictures into tensors.
    The other readers and writers of the module keep their own clear error.
    """
    if not image._has_image_ops():
        image.decode_image = decode_image


def decode_image(input, mode=0, apply_exif_orientation=False):
    """An encoded picture as a uint8 tensor [channels, height, width]; torchvision.io.decode_image's signature.

    input: a path, or the file's bytes as a uint8 tensor [n]. mode: an ImageReadMode, its name or its number.
    A palette becomes RGB (RGBA where it has transparency); what has more than 8 bits a channel keeps its upper 8.
    RuntimeError if the bytes are no whole picture, as torchvision raises; OSError if the path cannot be read.
    """
    from PIL import Image, ImageOps
    from torchvision.io import ImageReadMode
    from torchvision.transforms.functional import pil_to_tensor

    mode = ImageReadMode[mode.upper()] if isinstance(mode, str) else ImageReadMode(mode)
    wanted = _PILLOW_MODES.get(mode.value)
    source = io.BytesIO(input.numpy().tobytes()) if hasattr(input, "numpy") else input
    try:
        with Image.open(source) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened) if apply_exif_orientation else opened
            return pil_to_tensor(_eight_bits(picture).convert(wanted or _own_mode(picture)))
    except (OSError, SyntaxError) as error:
        if getattr(error, "errno", None):  # the file system's; Pillow's own have no number
            raise
        raise RuntimeError(f"cannot decode the picture: {error}") from error


def _eight_bits(picture):
    """Sixteen-bit grey (Pillow's I and I;16) scaled down to L, which Pillow's own convert would clip instead."""
    if not picture.mode.startswith("I"):
        return picture
    import numpy
    from PIL import Image

    return Image.fromarray((numpy.asarray(picture).astype(numpy.uint32) >> 8).astype(numpy.uint8))


def _own_mode(picture) -> str:
    """The mode nearest to what the file holds: grey, grey and alpha, RGB or RGBA."""
    if picture.mode in {"1", "L"} or picture.mode.startswith("I"):
        return "L"
    if picture.mode in {"LA", "RGB", "RGBA"}:
        return picture.mode
    return "RGBA" if picture.mode == "PA" or "transparency" in picture.info else "RGB"


def ask_for_amx_tiles() -> bool:
    """Ask the kernel for this process's AMX tiles; whether they may be used now.

    A process must ask before its first tile instruction. Other code of torch and vLLM asks, the int4 kernel does not:
    under --enforce-eager a first request of text alone reaches it first, and the process ends in SIGILL. vLLM calls its
    general plugins in each of its processes before it loads a model. False, and nothing done, on a CPU without tiles.
    """
    import torch

    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
