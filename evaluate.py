"""Accuracy, FLOPs and kept tokens of a ViT, dense and with its tokens reduced.

    python evaluate.py                                     the demo and its learned thresholds
    python evaluate.py --data /imagenet --thresholds out/thresholds.json            DeiT-S
    python evaluate.py --method tome --r 8                 the demo with a fixed count
    torchrun --nproc_per_node 8 evaluate.py --data ...     shared among eight GPUs

Pictures, speed and the frontier of all methods: see experiments/.
"""

import json
import sys

from extras import batching, measuring, models, runtime


def parse_args(argv=None):
    """The flags."""
    parser = runtime.command_line("Evaluate a ViT, dense and reduced. Without flags: the demo.")
    models.model_flags(parser)
    models.threshold_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the metrics there")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line: build, evaluate, print, write."""
    args = parse_args(argv)
    try:
        device = runtime.find_device(args.device)
        val_set = models.open_split(args, "val")
        model, name = models.chosen_model(args)
        models.number_classes(model, val_set)
        models.check_classes(val_set, model)
    except ValueError as error:
        runtime.stop(error)
    val_set.transform = models.clean_transform(model.config)
    images = batching.subset(val_set, args.limit_val)
    metrics, bad = measuring.measure(model.to(device), images, args, device)
    metrics = {"model": name, "method": model.method} | metrics
    runtime.say(measuring.report(metrics), sys.stdout)
    if args.json:
        runtime.write_file(args.json, json.dumps(metrics, indent=1))
    runtime.say_skipped(bad)


if __name__ == "__main__":
    runtime.run_main(main)
