"""Fine-tune a backbone of ours with detectron2, and test it; settings and weights are checked before the work starts.

    python scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl
    export DETECTRON2_DATASETS=...          # the folder that holds coco/, VOC2007/ and VOC2012/
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG MODEL.WEIGHTS r50.pkl OUTPUT_DIR output/r50
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG --resume OUTPUT_DIR output/r50
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG --eval-only \
        MODEL.WEIGHTS output/r50/model_final.pth OUTPUT_DIR output/r50

CONFIG is a file of inscon/transfer/detectron2/configs. Flags stand before the first KEY VALUE pair. --resume goes on from the
newest checkpoint in OUTPUT_DIR, of the same weights and settings (config.yaml). OUTPUT_DIR has all a fine-tuned model is:
config.yaml and model_final.pth, rebuilt by detectron2's build_model after `import inscon.transfer.detectron2`.
"""

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from inscon import guard
from inscon.transfer.detectron2 import check


def main(arguments: list[str] | None = None) -> None:
    if not find_spec("detectron2"):
        raise check.SettingsError("detectron2 is not installed; compile it as docs/reproduce.md says, or use mmdet")
    from detectron2.engine import default_argument_parser, launch

    args = default_argument_parser(epilog=__doc__).parse_args(arguments)
    cfg = check.read_config(args.config_file, args.opts, args.num_gpus * args.num_machines)
    check_start(cfg, args)
    with guard.only_process(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR") if args.machine_rank == 0 else contextlib.nullcontext():
        launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (cfg, args))


def check_start(cfg, args) -> None:
    """Everything that can be refused before a process is started. Of a test, MODEL.WEIGHTS and OUTPUT_DIR are set to its own."""
    there = 1 if cfg.MODEL.DEVICE == "cpu" else torch.cuda.device_count()
    if args.num_gpus > there:
        found = f"--num-gpus must be at most {there} here. Found: {args.num_gpus}"
        raise check.SettingsError(f"{found}; lower it, or set it to 1 and MODEL.DEVICE cpu")
    for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check.check_data_set(cfg, name)
    last = check.check_output(cfg, args.resume, args.eval_only)
    weights = str(last or cfg.MODEL.WEIGHTS)
    print(check.check_weights(cfg, weights, whole=args.eval_only or last is not None))
    if args.eval_only:
        cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = weights, str(Path(cfg.OUTPUT_DIR, "inference"))
        return
    s = cfg.SOLVER
    print(f"{s.IMS_PER_BATCH} images a step, learning rate {s.BASE_LR:g}, lower after {s.STEPS}, {s.MAX_ITER} steps.")


def work(cfg, args) -> None:
    """One process of the training, with a test at its end, or of a test; AP is in log.txt."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultTrainer, default_setup
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            """AP as VOC or as COCO counts it, by what the data set is registered as."""
            if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc":
                return PascalVOCDetectionEvaluator(dataset_name)
            return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    default_setup(cfg, args)  # which writes config.yaml
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    guard.run_script("train_net.py", main)
