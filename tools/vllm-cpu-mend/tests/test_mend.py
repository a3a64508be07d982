"""Each seam shown open without the mend and closed with it, in fresh processes of this environment.

The seams are facts about other packages: where one is closed already (a torchvision whose libraries load), the test
that shows it open is skipped, and the test that shows it working still runs.
"""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("vllm_cpu_mend", reason="the mend is for the CPU environment")

WITHOUT_MEND = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != 'vllm_cpu_mend']\n"
PACKAGE = Path(str(importlib.metadata.distribution("vllm").locate_file("vllm_cpu_mend")))


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process of this interpreter."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def said(code: str, *options: str) -> str:
    """What code prints; the test fails with its error if it ends badly."""
    done = python(code, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def native_torchvision() -> bool:
    """Whether this torchvision's own libraries load, so that nothing is broken."""
    return said("import torchvision.extension as e; print(e._has_ops())") == "True"


# --- seam 1: torchvision's operators ---


def test_torchvision_does_not_import_without_the_mend(native_torchvision):
    if native_torchvision:
        pytest.skip("this torchvision is sound")
    done = python(WITHOUT_MEND + "import torchvision")
    assert done.returncode != 0
    assert "operator torchvision::nms does not exist" in last_line(done)


def test_torchvision_imports_and_transforms():
    code = """
        import torch, torchvision
        from torchvision.transforms.v2 import functional
        image = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
        print(tuple(functional.resize(image, [4, 4], antialias=True).shape))
    """
    assert said(code) == "(3, 4, 4)"


def test_a_missing_kernel_is_still_an_error(native_torchvision):
    if native_torchvision:
        pytest.skip("this torchvision is sound")
    done = python("import torch, torchvision; torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)")
    assert done.returncode != 0
    assert "Couldn't load custom C++ ops" in done.stderr


def test_a_sound_torchvision_is_left_alone():
    from vllm_cpu_mend import seams

    class Sound:
        _has_ops = staticmethod(lambda: True)
        _has_image_ops = staticmethod(lambda: True)
        decode_image = "its own"

    before = list(seams._declared)
    seams.declare_detection_operators(Sound)
    seams.decode_images_with_pillow(Sound)
    assert seams._declared == before
    assert Sound.decode_image == "its own"


# --- seam 2: reading pictures ---


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A PNG of 3 x 2 pixels (width x height), one red, the others blue."""
    from PIL import Image

    image = Image.new("RGB", (3, 2), (0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0))
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    image.save(path)
    return path


def test_transformers_cannot_read_a_picture_without_the_mend(native_torchvision, picture):
    if native_torchvision:
        pytest.skip("this torchvision is sound")
    # The first seam is closed by hand, to come as far as the second.
    code = f"""
        import torch
        ops = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            ops.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from transformers.image_utils import load_image_as_tensor
        load_image_as_tensor({str(picture)!r})
    """
    done = python(WITHOUT_MEND + textwrap.dedent(code))
    assert done.returncode != 0
    assert "Couldn't load the image extension" in done.stderr


def test_transformers_reads_a_picture_by_path_and_by_base64(picture):
    code = f"""
        import base64, pathlib
        from transformers.image_utils import load_image_as_tensor
        path = {str(picture)!r}
        data = "data:image/png;base64," + base64.b64encode(pathlib.Path(path).read_bytes()).decode()
        for source in (path, data):
            image = load_image_as_tensor(source)
            print(tuple(image.shape), image.dtype, image[:, 0, 1].tolist(), image[:, 1, 2].tolist())
    """
    assert said(code).splitlines() == ["(3, 2, 3) torch.uint8 [255, 0, 0] [0, 0, 255]"] * 2


@pytest.fixture
def decode_image():
    from vllm_cpu_mend.seams import decode_image

    return decode_image


def encoded(image, **options):
    """An image's file as a uint8 tensor, PNG unless told."""
    import io

    import torch

    file = io.BytesIO()
    image.save(file, **{"format": "PNG"} | options)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mode", "colour", "read_as", "expected"),
    [
        ("RGB", (10, 20, 30), "UNCHANGED", [10, 20, 30]),
        ("RGBA", (10, 20, 30, 40), "UNCHANGED", [10, 20, 30, 40]),
        ("RGBA", (10, 20, 30, 40), "RGB", [10, 20, 30]),
        ("L", 77, "UNCHANGED", [77]),
        ("L", 77, "RGB", [77, 77, 77]),
        ("LA", (77, 5), "GRAY_ALPHA", [77, 5]),
        ("1", 1, "UNCHANGED", [255]),
        ("I;16", 0x4D12, "UNCHANGED", [0x4D]),
        ("P", 0, "UNCHANGED", [0, 0, 0]),
        ("RGB", (255, 255, 255), "RGBA", [255, 255, 255, 255]),
    ],
)
def test_channels(decode_image, mode, colour, read_as, expected):
    from PIL import Image
    from torchvision.io import ImageReadMode

    data = encoded(Image.new(mode, (4, 5), colour))
    for asked in (read_as, ImageReadMode[read_as], ImageReadMode[read_as].value):
        image = decode_image(data, mode=asked)
        assert tuple(image.shape) == (len(expected), 5, 4)
        assert image[:, 3, 2].tolist() == expected


def test_orientation_is_applied_when_asked(decode_image):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    data = encoded(Image.new("RGB", (4, 2)), format="JPEG", exif=exif)
    assert tuple(decode_image(data).shape) == (3, 2, 4)
    assert tuple(decode_image(data, apply_exif_orientation=True).shape) == (3, 4, 2)


def test_what_is_no_picture_is_an_error(decode_image, tmp_path):
    import torch
    from PIL import Image

    with pytest.raises(RuntimeError, match="cannot decode"):
        decode_image(torch.zeros(100, dtype=torch.uint8))
    whole = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(RuntimeError, match="cannot decode"):
        decode_image(whole[: len(whole) // 2])
    with pytest.raises(FileNotFoundError):
        decode_image(str(tmp_path / "absent.png"))


# --- seam 3: the name ---


def test_the_metadata_named_vllm_is_the_mend_and_fits_the_engine():
    engine = importlib.metadata.version("vllm-cpu")
    mend = importlib.metadata.distribution("vllm")
    assert mend.version == engine + "+cpu"
    assert f"vllm-cpu=={engine}" in (mend.requires or [])
    top = {file.parts[0] for file in mend.files or []}
    assert "vllm" not in top, "the mend must not write into the engine's package"


def test_the_vllm_command_starts():
    command = Path(sys.executable).parent / "vllm"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == importlib.metadata.version("vllm")


def test_the_vllm_command_does_not_start_without_the_name():
    code = """
        import importlib.metadata, sys
        ask = importlib.metadata.Distribution.from_name.__func__
        def without_mend(cls, name):
            if name == "vllm":
                raise importlib.metadata.PackageNotFoundError(name)
            return ask(cls, name)
        importlib.metadata.Distribution.from_name = classmethod(without_mend)
        sys.argv = ["vllm", "--version"]
        from vllm.entrypoints.cli.main import main
        main()
    """
    done = python(code)
    assert done.returncode != 0
    assert "No package metadata was found for vllm" in done.stderr


# --- seam 4: the tiles ---


def test_vllm_loads_the_plugin_and_it_runs():
    code = """
        import logging
        from vllm.plugins import load_plugins_by_group
        plugins = load_plugins_by_group("vllm.general_plugins")
        print("cpu_amx_tiles", plugins["cpu_amx_tiles"]() in (True, False))
    """
    assert said(code).splitlines()[-1] == "cpu_amx_tiles True"


def test_the_kernel_grants_the_tiles():
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "amx_tile" not in flags.read_text():
        pytest.skip("this CPU has no AMX tiles")
    # arch_prctl(ARCH_GET_XCOMP_PERM) gives the process's granted states; bit 18 is the tile data.
    code = """
        import ctypes
        from vllm_cpu_mend.seams import ask_for_amx_tiles
        def granted():
            mask = ctypes.c_uint64()
            assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0
            return bool(mask.value >> 18 & 1)
        print(granted(), ask_for_amx_tiles(), granted())
    """
    assert said(code) == "False True True"


# --- the .pth file ---


def test_a_start_of_python_imports_nothing_heavy():
    loaded = said("import sys; print(*sorted(m.split('.')[0] for m in sys.modules))").split()
    assert "vllm_cpu_mend" in loaded
    assert not {"torch", "torchvision", "transformers", "vllm", "PIL", "numpy"} & set(loaded)


def test_a_start_of_python_costs_less_than_five_milliseconds():
    def microseconds() -> int:
        done = python("pass", "-X", "importtime")
        line = next(line for line in done.stderr.splitlines() if line.endswith("vllm_cpu_mend"))
        return int(line.split("|")[1])

    assert min(microseconds() for _ in range(5)) < 5000


def test_it_can_be_taken_away():
    """Installed into a folder of its own, used from there, and gone with the files its RECORD names."""
    mend = importlib.metadata.distribution("vllm")
    names = {str(file) for file in mend.files or []}
    assert {"vllm_cpu_mend.pth", "vllm_cpu_mend/__init__.py", "vllm_cpu_mend/seams.py"} <= names
    on_disk = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.py")}
    assert on_disk <= names, "every file is known to the installer, so uninstalling leaves none"
    bare = python("import vllm_cpu_mend", "-S", "-I")
    assert bare.returncode != 0, "without site-packages nothing of it is active"


def test_watching_twice_changes_nothing():
    assert said("import vllm_cpu_mend as m, sys; m.watch(); print(sys.meta_path.count(m.Watch))") == "1"


if __name__ == "__main__":
    sys.exit(pytest.main([os.path.abspath(__file__)]))
