"""Fine-tune a trunk of ours with detectron2, and test it; settings and weights are checked before the work starts.

    python scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl
    export DETECTRON2_DATASETS=...          # the folder that holds coco/, VOC2007/ and VOC2012/
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 \
        --config-file inscon/transfer/detectron2/configs/coco_mask_rcnn_fpn_1x.yaml MODEL.WEIGHTS r50.pkl
    ... --resume                            # goes on from the newest checkpoint in OUTPUT_DIR
    ... --eval-only MODEL.WEIGHTS output/coco_mask_rcnn_fpn_1x/model_final.pth

OUTPUT_DIR has all a fine-tuned model is: config.yaml and model_final.pth, rebuilt by detectron2's build_model after
`import inscon.transfer.detectron2`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script, whose own folder gives way to the repository's root
    sys.path[:] = [str(HERE.parents[2]), *(p for p in sys.path if Path(p).resolve() not in (HERE, HERE.parent))]

import torch

from inscon.transfer.detectron2.settings import (
    SettingsError,
    check_data_sets,
    describe_schedule,
    read_config,
    require_detectron2,
)
from inscon.transfer.detectron2.weights import WeightsError, check_weights


def main(arguments: list[str] | None = None) -> None:
    require_detectron2()
    from detectron2.engine import default_argument_parser, launch

    args = default_argument_parser(epilog=__doc__).parse_args(arguments)
    cfg = read_config(args.config_file, args.opts, args.num_gpus * args.num_machines)
    check(cfg, args)
    launch(
        work,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )


def check(cfg, args) -> None:
    """Everything that can be refused before a process is started: devices, data sets, weights."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    there = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > there:
        remedy = f"set --num-gpus {there}" if there else "set --num-gpus 1 and MODEL.DEVICE cpu to try it slowly"
        raise SettingsError(f"--num-gpus {args.num_gpus} is more than there are here. Found: {there}; {remedy}")
    check_data_sets(cfg, test_only=args.eval_only)
    if args.resume and DetectionCheckpointer(torch.nn.Module(), cfg.OUTPUT_DIR).has_checkpoint():
        return  # what MODEL.WEIGHTS says is not read
    model = build_model(_with(cfg, "MODEL.DEVICE", "cpu"))
    print(check_weights(cfg.MODEL.WEIGHTS, model, whole=args.eval_only))
    print(describe_schedule(cfg))


def work(cfg, args) -> None:
    """One process of the training, with a test at its end, or of a test; AP is in log.txt."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import DefaultTrainer, default_setup

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return evaluator(cfg, dataset_name)

    if args.eval_only:
        results = str(Path(cfg.OUTPUT_DIR, "inference"))
        default_setup(_with(cfg, "OUTPUT_DIR", results), args)  # the training's config.yaml stays as it is
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        Trainer.test(cfg, model)
        return
    default_setup(cfg, args)  # which writes config.yaml
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def evaluator(cfg, name: str):
    """AP as VOC or as COCO counts it, by what the data set is registered as."""
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    if MetadataCatalog.get(name).evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    return COCOEvaluator(name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")))


def _with(cfg, *options: str):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(options))
    cfg.freeze()
    return cfg


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, WeightsError) as error:
        raise SystemExit(f"train_net.py: {error}") from None
