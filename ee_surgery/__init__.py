"""Early exit for any pretrained vision model: inspect -> place -> attach -> train -> calibrate -> run -> save.

Public names are in `__init__.pyi`, and imported on first use: `ee_surgery.onnx` runs without torch.
"""

import lazy_loader as _lazy

from ee_surgery.integrations import register as _register

__version__ = "0.1.0"

_public, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "POLICIES":
        from ee_surgery.calibration.methods import CALIBRATORS
        from ee_surgery.checks import renamed

        return renamed("ee.POLICIES", CALIBRATORS, "ee.CALIBRATORS", CALIBRATORS)
    return _public(name)


_register()  # with transformers, as soon as it is imported
