"""Runs a mend right after the module that needs it, and costs nothing until then.

A .pth file calls `watch` at every start of Python, so this file imports only `sys`. What the mends are is in `seams`.
"""

import sys

# module -> the function of `seams` that is called with it as soon as it has run, before its importer sees it
SEAMS = {
    "torchvision.extension": "declare_detection_operators",
    "torchvision.io.image": "decode_images_with_pillow",
}


class Watch:
    """A finder that stands before Python's own, finds what they find, and adds the mend to two modules."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in SEAMS:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_mend(module):
            run(module)
            from . import seams

            getattr(seams, SEAMS[name])(module)

        spec.loader.exec_module = run_then_mend
        return spec


def watch() -> None:
    """Begin to watch the imports of this process; a second call changes nothing."""
    if Watch not in sys.meta_path:
        sys.meta_path.insert(0, Watch)
