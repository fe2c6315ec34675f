"""A model from its name, weights and thresholds, as the flags of a program say."""

import hashlib
import json
from pathlib import Path

import data
import ltmp

from . import fast_attention, runtime, splits, weights

DEMO = Path(__file__).parent.parent / "demo"
DEMO_WEIGHTS, DEMO_THRESHOLDS = DEMO / "vit_demo.pth", DEMO / "thresholds.json"
# The WordNet ids of ImageNet's 1,000 classes, in the order of their numbers.
IMAGENET_IDS = Path(__file__).with_name("imagenet_ids.txt")


def model_flags(parser):
    """Add the flags that name a model."""
    add = parser.add_argument
    add(
        "--model",
        choices=ltmp.VARIANTS,
        metavar="NAME",
        help=f"{', '.join(ltmp.VARIANTS)} (default: demo; with --data deit_small_patch16_224)",
    )
    add(
        "--weights",
        metavar="FILE",
        help="checkpoint of the ViT, a path or URL, or `none` for random weights (default: the "
        "demo's own, or DeiT's official ones, downloaded once)",
    )
    add(
        "--num-classes",
        type=runtime.at_least(1),
        metavar="N",
        help="classes (default: those of the weights); another number makes a new head, to be "
        "trained by train.py --method dense",
    )
    add(
        "--image-size",
        type=runtime.at_least(1),
        metavar="PIXELS",
        help="side of the images; position embeddings are resized (default: the model's)",
    )


def threshold_flags(parser):
    """Add the flags that say how tokens are reduced."""
    add = parser.add_argument
    add(
        "--thresholds",
        metavar="FILE",
        help="thresholds.json from train.py (default: those in the checkpoint; the demo's own)",
    )
    add(
        "--method",
        choices=ltmp.METHODS,
        metavar="METHOD",
        help=f"{', '.join(ltmp.METHODS)} (default: that of the thresholds)",
    )
    add(
        "--r",
        type=runtime.at_least(0),
        nargs="+",
        metavar="N",
        help="tokens that tome or topk removes per block: one number, or one per block",
    )


def settle_model(args):
    """Fill in --model, and --image-size where --weights is a last.pt that knows it.

    Returns the flags with which train.py wrote that file, {} for other files. Raises ValueError
    where --model is not the file's.
    """
    known = weights.read_settings(args.weights) if args.weights else {}
    name = known.get("model")
    if name and args.model not in (None, name):
        raise ValueError(f"{args.weights} is of the model {name}: leave out --model {args.model}")
    args.model = args.model or name or ("deit_small_patch16_224" if args.data else "demo")
    if args.image_size is None:
        args.image_size = known.get("image_size")
    elif name:
        size = known["image_size"] or ltmp.VARIANTS[args.model].image_size
        if size != args.image_size:
            runtime.say(f"note: {args.weights} was learned at {size} pixels, not {args.image_size}")
    part, before = args.val_fraction or 0, known.get("val_fraction")
    if part and before and Path(known["data"]).resolve() == Path(args.data).resolve():
        # The same seed draws a smaller part from a larger one.
        if part > before or args.seed != known["seed"]:
            runtime.say(
                f"note: {args.weights} may have learned from images of this validation set: it had "
                f"--val-fraction {before:g} --seed {known['seed']}"
            )
    return known


def read_weights(name, source):
    """The state dict that --weights names: a path or URL; None: the model's own; "none": None."""
    if source == "none":
        return None
    if source is None:
        source = DEMO_WEIGHTS if name == "demo" else weights.official_weights(name)
    return weights.read_checkpoint(source, runtime.say)


def build_model(name, method, state, tau=0.1, r=None, num_classes=None, image_size=None):
    """A model with the weights in state (see read_weights), random ones if None.

    num_classes=None takes as many as the weights have. Raises ValueError where it does not fit.
    """
    options = {"tau": tau, "r": r, "attention": fast_attention}
    if image_size:
        options["image_size"] = image_size
    if state is None:
        return ltmp.create_model(name, method, num_classes, **options)
    found = len(state["head.weight"]) if "head.weight" in state else None
    model = ltmp.create_model(name, method, num_classes or found, **options)
    new_head = num_classes is not None and num_classes != found
    if new_head:
        runtime.say(
            f"note: the head for {num_classes} classes is new "
            f"(the weights have {found or 'none'}): train it with train.py --method dense"
        )
    fitting = weights.fit(state, model, new_head)
    if fitting["pos_embed"].shape != state["pos_embed"].shape:
        runtime.say(
            f"note: the weights are for {state['pos_embed'].shape[1]} tokens, the model has "
            f"{model.config.num_tokens}: position embeddings are resized"
        )
    return ltmp.load_weights(model, fitting)


def with_method(model, method):
    """The same weights with another method; thresholds that the model has none for are new."""
    other = ltmp.LTMPViT(model.config, method, attention=model.attention)
    return ltmp.load_weights(other.to(model.cls_token.device), model.state_dict())


def chosen_model(args):
    """The model that model_flags and threshold_flags ask for, and its name. Raises ValueError."""
    known = settle_model(args)
    name, image_size, found = args.model, args.image_size, None
    state = read_weights(name, args.weights)
    method = args.method or (None if args.thresholds else known.get("method"))
    if method in ("tome", "topk") and not args.r:
        raise ValueError(f"--method {method} needs --r, the tokens to remove per block")
    if args.r and method not in ("tome", "topk"):
        raise ValueError("--r goes with --method tome or --method topk")
    if method in ("dense", "tome", "topk"):
        if args.thresholds:
            raise ValueError(f"--method {method} has no thresholds: leave one of the two out")
    elif args.thresholds or not has_thresholds(state):
        if not args.thresholds and name != "demo":
            raise ValueError("--thresholds FILE is needed: the thresholds.json of train.py")
        found = read_thresholds(args.thresholds or DEMO_THRESHOLDS)
        if found.get("model", name) != name:
            raise ValueError(
                f"the thresholds were learned for {found['model']}, the model is {name}: "
                f"pass --model {found['model']}"
            )
        others = found.get("weights", "the model's own")
        if args.thresholds and args.weights is None and others != "the model's own":
            raise ValueError(f"the thresholds were learned for other weights: --weights {others}")
        method = method or found["method"]
        learned = found.get("image_size")
        if learned and image_size and learned != image_size:
            runtime.say(f"note: the thresholds were learned at {learned} pixels, not {image_size}")
            found |= {"image_size": image_size}
        image_size = image_size or learned
    else:
        method = method or method_of(state)
    r = args.r[0] if args.r and len(args.r) == 1 else args.r
    model = build_model(name, method, state, 0.1, r, args.num_classes, image_size)
    return (ltmp.load_thresholds(model, found) if found else model), name


def has_thresholds(state):
    """Whether a state dict has thresholds."""
    return any(name.endswith("_masker.threshold") for name in state or ())


def method_of(state):
    """The method that the thresholds of a state dict are for."""
    steps = [s for s in ("merge", "prune") if f"blocks.0.{s}_masker.threshold" in state]
    return {"merge": "ltm", "prune": "ltp", "merge prune": "ltmp"}[" ".join(steps)]


def seal(content):
    """The content of a thresholds.json with its own checksum, by which damage is seen."""
    plain = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return plain | {"sha256": digest[:16]}


def read_thresholds(path):
    """The content of a thresholds.json. Raises ValueError where it is none, damaged or edited."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read thresholds from {path}: {error}") from None
    if not isinstance(found, dict) or found.get("method") not in list(ltmp.METHODS):
        raise ValueError(f"{path} is no thresholds.json: it names no method")
    if "sha256" in found and found != seal(found):
        raise ValueError(
            f'{path} is not what train.py wrote: damaged, or edited; without its "sha256" it loads'
        )
    return found


def clean_transform(config):
    """data.eval_transform as the weights of a ViTConfig want it."""
    return data.eval_transform(config.image_size, config.crop_pct, config.mean, config.std)


def open_split(args, split):
    """splits.open_split as the flags say; files that are no images are counted in one line."""
    dataset = splits.open_split(args.data, split, None, args.val_fraction, args.seed)
    count = getattr(dataset, "passed_over", 0)
    if count:
        types = " ".join(data.EXTENSIONS)
        runtime.say(f"note: {count} files beside the {split} images are none of {types}")
    return dataset


def open_both(args):
    """The training and the validation images. Raises ValueError where their classes differ."""
    train_set, val_set = open_split(args, "train"), open_split(args, "val")
    odd = sorted(set(train_set.classes) ^ set(val_set.classes))
    if odd:
        names = ", ".join(odd[:5])
        raise ValueError(f"train and val have different classes: {names} in one alone")
    return train_set, val_set


def number_classes(model, *datasets):
    """Give labels ImageNet's class numbers where the model has its 1,000 classes.

    datasets: of the same classes; they change where all their folders are named by ImageNet's ids.
    """
    classes, ids = datasets[0].classes, IMAGENET_IDS.read_text().split()
    if len(classes) < model.config.num_classes == len(ids) and set(classes) <= set(ids):
        numbers = [ids.index(name) for name in classes]
        for dataset in datasets:
            dataset.samples = [(path, numbers[label]) for path, label in dataset.samples]
            dataset.classes = ids
        count = len(classes)
        runtime.say(f"note: the {count} classes are ImageNet's: labels are their numbers there")


def check_classes(dataset, model):
    """Raise ValueError where the data has classes that the model does not know."""
    count, known = len(dataset.classes), model.config.num_classes
    if count > known:
        raise ValueError(
            f"the data has {count} classes, the model has {known}: --num-classes {count} makes a "
            "new head, to be trained by train.py --method dense"
        )
    if count < known:
        runtime.say(
            f"note: the data has {count} classes, the model has {known}: labels are taken as their "
            f"first {count}"
        )
