"""Fine-tuning with detectron2, as the paper's tables do it. Importing this makes the head of the C4 configs known to detectron2."""

from importlib.util import find_spec

if find_spec("detectron2"):
    from inscon.transfer.detectron2 import heads  # noqa: F401
