"""Fine-tuning a backbone of ours with detectron2, as the paper's tables do it: settings, one head, and checks before the work.

`import inscon.transfer.detectron2` is what rebuilding a fine-tuned model takes beside its config.yaml: it makes the head
`Res5ROIHeadsExtraNorm` known to detectron2, where that is installed. Nothing here imports detectron2 before it is used.
"""

from inscon.transfer.detectron2.heads import register_heads
from inscon.transfer.detectron2.settings import installed

if installed():
    register_heads()
