"""Published checkpoints of plain ViTs, whatever library wrote them: a state dict in DeiT's names.

    state = read_checkpoint("model.safetensors")
    ltmp.load_weights(model, fit(state, model))

Files are told apart by their content, not by their name, and no code in them is ever run:

    torch          DeiT and DeiT-III, timm, DINOv2, Hugging Face, also inside a training checkpoint;
                   distillation and register tokens become part of cls_token (1, P, C)
    .npz           Google's AugReg, "How to train your ViT?" (arXiv 2106.10270)
    .safetensors   any of these, with the package safetensors
"""

import argparse
import hashlib
import http.client
import math
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/"
# The digits in a name are the start of the file's SHA-256.
WEIGHTS = {
    "deit_tiny_patch16_224": DEIT_URL + "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": DEIT_URL + "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": DEIT_URL + "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_base_patch16_384": DEIT_URL + "deit_base_patch16_384-8de9b5d1.pth",
    "deit_small_distilled_patch16_224": DEIT_URL + "deit_small_distilled_patch16_224-649709d9.pth",
}

# Where a training checkpoint keeps the weights. An average of them comes first.
WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")

# Weights of pretraining that inference does not need.
UNUSED = r"mask_token$|^(vit\.|deit\.)?pooler\.|^pre_logits/"

# Names of other libraries -> DeiT's: regular expressions, applied in this order.
DEIT_III = [(r"\.gamma_([12])$", r".ls\1.gamma")]
HUGGING_FACE = [
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|register_tokens)", r"\1"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)", r"attn.\2"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm", "norm"),
    (r"^(cls_)?classifier", "head"),
    (r"^distillation_classifier", "head_dist"),
]
FLAX = [
    (r"/", "."),
    (r"^cls$", "cls_token"),
    (r"^embedding", "patch_embed.proj"),
    (r"^Transformer\.posembed_input\.pos_embedding", "pos_embed"),
    (r"^Transformer\.encoderblock_", "blocks."),
    (r"^Transformer\.encoder_norm", "norm"),
    (r"LayerNorm_0", "norm1"),
    (r"LayerNorm_2", "norm2"),
    (r"MultiHeadDotProductAttention_1\.out", "attn.proj"),
    (r"MultiHeadDotProductAttention_1\.(q|k|v)(uery|ey|alue)", r"attn.\1"),
    (r"MlpBlock_3\.Dense_0", "mlp.fc1"),
    (r"MlpBlock_3\.Dense_1", "mlp.fc2"),
    (r"(scale|kernel)$", "weight"),
]

# Tokens that stand between the class token and the patches.
PREFIX = ("dist_token", "reg_token", "register_tokens")

# Models that are no plain ViT: a weight that only they have, and what they are.
OTHER_MODELS = [
    (r"(^|\.)fc_norm\.", "a ViT whose head reads the mean of the patches"),
    (r"(^|\.)attn_pool\.", "a ViT whose head pools the patches by attention"),
    (r"\.[qk]_norm\.", "a ViT that normalizes its queries and keys"),
    (r"(^|\.)norm_pre\.", "a ViT with a norm before its first block"),
    (r"relative_position|rel_pos", "a ViT with relative positions"),
    (r"\.mlp\.(w12|weights_in|fc1_g)\.", "a ViT with a gated MLP"),
]
# What every plain ViT has, and what a model without it is.
NEEDED = {
    "cls_token": "a model without a class token, or in unknown names (no cls_token)",
    "pos_embed": "a model without learned positions, or in unknown names (no pos_embed)",
}
PLAIN = "only a plain ViT that classifies by its class token can be loaded"


# --------------------------------------------------------------------------------------------------
# From a source to a state dict


def official_weights(name):
    """The published state dict of a DeiT. Raises ValueError where there is none to be had."""
    if name not in WEIGHTS:
        raise ValueError(f"no official weights are known for {name}: pass a checkpoint")
    return read_checkpoint(WEIGHTS[name])


def download(url):
    """Fetch a URL once into the folder of torch.hub and return the path.

    A name like vit-0123abcd.pth holds eight or more digits of the SHA-256: its content is checked.
    Other names, such as model.safetensors, get the hash of the URL in front: many files have them.
    Raises ValueError where the file cannot be had or its hash is another.
    """
    name = Path(url).name
    digits = re.search(r"-([0-9a-f]{8,64})\.", name)
    if not digits:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digits and digits[1])
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = f"cannot download {url} ({error})"
            raise ValueError(f"{reason}: pass the file as a checkpoint") from None
    return path


def read_checkpoint(source, say=lambda line: None):
    """Weights of a plain ViT as a dict: names of DeiT and timm -> tensors.

    source: a path, a URL (http, https, file), or what such a file holds, a dict.
    Of weights and their average (model_ema, state_dict_ema) the average is taken: say, a function
    of a line, is told so. Distillation and register tokens join cls_token (1, P, C). Prefix tokens
    without a position, such as DeiT-III's class token, get a zero one.
    Raises ValueError where the source holds no weights, or those of another kind of model.
    """
    state, where = source, "the state dict"
    if not isinstance(source, dict):
        where = str(source)
        is_url = re.match(r"(https?|file)://", where)
        state = read_file(download(where) if is_url else source)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            if wrapper.endswith("_ema"):
                say(f"note: the weights are the average that {where} holds as {wrapper}")
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(name, str) and torch.is_tensor(w) for name, w in items):
        raise ValueError(f"{where} holds no state dict: names of weights and their tensors")
    state = _in_deit_names(_strip_prefixes(state))
    for pattern, kind in OTHER_MODELS:
        for name in state:
            if re.search(pattern, name):
                raise ValueError(f"{where} holds {kind} ({name}): {PLAIN}")
    for name, kind in NEEDED.items():
        if name not in state:
            raise ValueError(f"{where} holds {kind}: {PLAIN}")
    try:
        return _join_prefix_tokens(state)
    except (IndexError, KeyError, RuntimeError):
        problem = "prefix tokens, positions or heads that do not fit together"
        raise ValueError(f"{where} holds {problem}") from None


def fit(state, model, new_head=False):
    """The state dict of read_checkpoint made to fit the model; ltmp.load_weights then checks it.

    Position embeddings are resized to the model's grid. new_head=True takes the model's own head
    where the checkpoint has none, or one for another number of classes.
    Raises ValueError where the state dict has more or fewer prefix tokens than the model, or its
    positions are not those of prefix tokens and a square grid.
    """
    own, state = model.state_dict(), dict(state)
    num_tokens, prefix_tokens = model.config.num_tokens, model.config.prefix_tokens
    found = state["cls_token"].shape[1] if state["cls_token"].dim() == 3 else prefix_tokens
    if found != prefix_tokens:
        counts = f"the weights have {found}, the model has {prefix_tokens}"
        raise ValueError(f"{counts} prefix tokens (class token, distillation token, registers)")
    positions = state["pos_embed"]
    if positions.dim() == 3 and positions.shape[1] != num_tokens:
        state["pos_embed"] = resize_positions(positions, num_tokens, prefix_tokens)
    head = state.get("head.weight", torch.empty(0))
    if new_head and "head.weight" in own and head.shape != own["head.weight"].shape:
        state |= {"head.weight": own["head.weight"], "head.bias": own["head.bias"]}
    return state


def resize_positions(pos_embed, num_tokens, prefix_tokens=1):
    """Position embeddings (1, P + g * g, C) for another square grid -> (1, num_tokens, C).

    Bicubic and anti-aliased, as in timm; the P prefix tokens keep their own. Meta and Hugging Face
    do not anti-alias those of DINOv2 without registers: its features differ a little from theirs.
    """
    count = pos_embed.shape[1]
    if not _is_square(count - prefix_tokens):
        tokens = "a class token" if prefix_tokens == 1 else f"{prefix_tokens} prefix tokens"
        problem = f"pos_embed has {count} positions"
        raise ValueError(f"{problem}, not those of {tokens} and a square grid")
    old, new = math.isqrt(count - prefix_tokens), math.isqrt(num_tokens - prefix_tokens)
    own, grid = pos_embed.float().split([prefix_tokens, old * old], dim=1)
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, C, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)  # (1, C, new, new)
    return torch.cat([own, grid.flatten(2).transpose(1, 2)], dim=1)


# --------------------------------------------------------------------------------------------------
# From a file to what it holds


class _Refused(Exception):
    """A file that is known, but not read; its message says what to do."""


def read_file(path):
    """What a checkpoint's file holds. Raises ValueError where it is none, or damaged.

    .safetensors and what torch wrote before 1.6 have no checksums: a changed number is not seen.
    """
    try:
        return _read_file(path)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    # The readers raise whatever a damaged file provokes.
    except Exception as error:  # noqa: BLE001
        code = re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error))
        if code:
            problem = f"{path} holds {code[1]}, which could run code and is not loaded"
            raise ValueError(f"{problem}: save its state dict alone") from None
        # The cause alone, without torch's advice to load the file all the same.
        cause = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
        reason = cause[1] if cause else (str(error) or type(error).__name__).splitlines()[0]
        reason = reason.split(" In PyTorch 2.6")[0]
        problem = f"{path} is no checkpoint, or damaged (then copy it again)"
        raise ValueError(f"{problem}: {reason}") from None


def read_settings(path):
    """The flags with which train.py wrote a last.pt, as a dict; {} for any other file."""
    try:
        # On this device nothing but the names of the weights is kept.
        found = torch.load(path, map_location="meta", weights_only=True)["settings"]
        return found if {"model", "method", "image_size"} <= found.keys() else {}
    # What is wrong with a file is said where its weights are read.
    except Exception:  # noqa: BLE001
        return {}


def _read_file(path):
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise _Refused("is a git-lfs pointer, not the file it stands for: run git lfs pull")
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch does not look at checksums, and can be told to write none.
            has_checksums = any(entry.CRC for entry in archive.infolist())
            wrong = archive.testzip() if has_checksums else None
        if wrong:
            raise ValueError(f"the checksum of {wrong} in it does not fit")
        if any(name.endswith(".npy") for name in names):
            import numpy

            with numpy.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if any("/code/" in name for name in names) and any("constants.pkl" in n for n in names):
            raise _Refused("is TorchScript, a model with its code: save its state dict alone")
    # Eight bytes of length, then JSON.
    if start[8:9] == b"{":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise _Refused("needs the package safetensors: pip install safetensors") from None
        return load_file(path)
    # Training scripts keep their flags beside the weights. A Namespace holds values, and no code.
    torch.serialization.add_safe_globals([argparse.Namespace])
    # Given the name, torch would go by its ending.
    with open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------------------
# From one library's names and shapes to another's


def _strip_prefixes(state):
    """Strip what DDP and torch.compile put in front of names, and Lightning in front of all."""
    prefix = r"^((module|_orig_mod)\.)*"
    if all(re.search(prefix + r"model\.", name) for name in state):
        prefix = r"^((module|_orig_mod|model)\.)*"
    return {re.sub(prefix, "", name): value for name, value in state.items()}


def _in_deit_names(state):
    state = {name: value for name, value in state.items() if not re.search(UNUSED, name)}
    table = DEIT_III
    if "embedding/kernel" in state:
        table = FLAX
        state = {name: _from_flax(name, value) for name, value in state.items()}
    elif any("embeddings.patch_embeddings" in name for name in state):
        table = HUGGING_FACE
    for pattern, ours in table:
        state = {re.sub(pattern, ours, name): value for name, value in state.items()}
    # attn.q, attn.k, attn.v -> attn.qkv
    for name in [name for name in state if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            joined = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return state


def _join_prefix_tokens(state):
    """One cls_token (1, P, C) for all prefix tokens, a position for each, and one head for two.

    The mean of two heads is one head, of half their weights, that reads both tokens side by side.
    """
    tokens = [state[name] for name in ("cls_token", *PREFIX) if name in state]
    state = {name: value for name, value in state.items() if name not in PREFIX}
    state["cls_token"] = torch.cat(tokens, 1)
    if "head_dist.weight" in state and "head.weight" in state:
        weights = state["head.weight"], state.pop("head_dist.weight")
        state["head.weight"] = torch.cat(weights, 1) / 2
        state["head.bias"] = (state["head.bias"] + state.pop("head_dist.bias")) / 2

    # Positions are there for the patches alone, for the class token too, or for all tokens.
    positions, P = state["pos_embed"], state["cls_token"].shape[1]
    own = next((own for own in (0, 1) if _is_square(positions.shape[1] - own)), P)
    if own < P:
        patches = F.pad(positions[:, own:], (0, 0, P - own, 0))
        state["pos_embed"] = torch.cat([positions[:, :own], patches], 1)
    return state


def _is_square(count):
    return count > 0 and math.isqrt(count) ** 2 == count


def _from_flax(name, value):
    """Flax keeps (in, out), and heads as a dimension: q, k, v (C, H, D), out (H, D, C)."""
    if name.endswith("kernel"):
        if value.dim() == 4:
            return value.permute(3, 2, 0, 1)
        return value.flatten(0, -2).T if "out/" in name else value.flatten(1).T
    return value.flatten() if "MultiHead" in name else value
