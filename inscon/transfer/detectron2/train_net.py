"""Fine-tune a backbone of ours with detectron2, and test it; settings and weights are checked before the work starts.

    python scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl
    export DETECTRON2_DATASETS=...          # the folder that holds coco/, VOC2007/ and VOC2012/
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG MODEL.WEIGHTS r50.pkl OUTPUT_DIR output/r50
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG --resume OUTPUT_DIR output/r50
    python inscon/transfer/detectron2/train_net.py --num-gpus 8 --config-file CONFIG --eval-only \
        MODEL.WEIGHTS output/r50/model_final.pth OUTPUT_DIR output/r50

CONFIG is a file of inscon/transfer/detectron2/configs. Flags stand before the first KEY VALUE pair. --resume goes on from the
newest checkpoint in OUTPUT_DIR, of the same weights and settings (identity.json). OUTPUT_DIR has all a fine-tuned model is:
config.yaml and model_final.pth, rebuilt by detectron2's build_model after `import inscon.transfer.detectron2`.
"""

import contextlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script, whose own folder gives way to the repository's root
    sys.path[:] = [str(HERE.parents[2]), *(p for p in sys.path if Path(p).resolve() not in (HERE, HERE.parent))]

import torch

from inscon import guard
from inscon.transfer.detectron2.identity import check_output, write_identity
from inscon.transfer.detectron2.settings import (
    SettingsError,
    check_backbone,
    check_data_sets,
    check_schedule,
    describe_schedule,
    read_config,
    require_detectron2,
    telling,
)
from inscon.transfer.detectron2.weights import check_weights


def main(arguments: list[str] | None = None) -> None:
    require_detectron2()
    from detectron2.engine import default_argument_parser, launch

    args = default_argument_parser(epilog=__doc__).parse_args(arguments)
    cfg = read_config(args.config_file, args.opts, args.num_gpus * args.num_machines)
    goes_on = check(cfg, args)
    with contextlib.ExitStack() as held:
        if not args.eval_only and args.machine_rank == 0:
            held.enter_context(guard.only_process(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR"))
            if not goes_on:
                write_identity(cfg)
        launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (cfg, args))


def check(cfg, args) -> bool:
    """Everything that can be refused before a process is started. Is there an earlier part of the run to go on from?"""
    check_devices(cfg, args)
    check_backbone(cfg)
    check_schedule(cfg)
    check_data_sets(cfg, test_only=args.eval_only)
    goes_on = check_output(cfg, args.resume, args.eval_only) is not None
    model = build(cfg)
    if not goes_on:  # else what MODEL.WEIGHTS says is not read
        print(check_weights(cfg.MODEL.WEIGHTS, model, whole=args.eval_only))
        print(describe_schedule(cfg))
    guard.check_output_folder(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    return goes_on


def build(cfg) -> torch.nn.Module:
    """The model on the CPU; SettingsError where detectron2 makes none from the settings."""
    from detectron2.modeling import build_model

    with telling("can't build the model of these settings", "leave out what you changed of MODEL"):
        return build_model(_with(cfg, "MODEL.DEVICE", "cpu"))


def check_devices(cfg, args) -> None:
    """SettingsError for more processes than there are GPUs for."""
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus > 1:
        raise SettingsError(f"MODEL.DEVICE cpu is for one process. Found: --num-gpus {args.num_gpus}; set --num-gpus 1")
    there = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > there:
        remedy = f"set --num-gpus {there}" if there else "set --num-gpus 1 and MODEL.DEVICE cpu to try it slowly"
        raise SettingsError(f"--num-gpus {args.num_gpus} is more than there are here. Found: {there}; {remedy}")


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
    guard.run_script("train_net.py", main)
