"""extras/weights.py: every publisher's checkpoint gives the same model, or a line says why not."""

import argparse
import hashlib
import io
import os
import random
import re
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ltmp
from extras import models, weights

IMAGE = torch.arange(432.0).sin().view(1, 3, 12, 12)


def make_model(**changes):
    config = ltmp.ViTConfig(12, 4, dim=32, depth=2, heads=2, num_classes=5)
    return ltmp.LTMPViT(replace(config, **changes), "dense")


def random_state(**changes):
    """A state dict of random weights that half precision holds exactly."""
    generator = torch.Generator().manual_seed(1)
    state = make_model(**changes).state_dict()
    return {n: torch.randn(w.shape, generator=generator).half().float() for n, w in state.items()}


def load(source, model, **options):
    state = weights.fit(weights.read_checkpoint(source), model, **options)
    return ltmp.load_weights(model, state)


def logits(source, **changes):
    model = load(source, make_model(**changes)).eval()
    with torch.no_grad():
        return model(IMAGE)[0]


def refusal(source):
    """The one line with which read_checkpoint refuses the source."""
    with pytest.raises(ValueError) as error:
        weights.read_checkpoint(source)
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# One state dict in the clothes of every library: each writer is written by hand


def split_qkv(state, pattern):
    """blocks.i.attn.qkv -> three entries named by pattern, with {i}, and {part} of q, k, v."""
    out = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            _, i, _, _, end = name.split(".")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"{pattern.format(i=i, part=part)}.{end}"] = piece
        else:
            out[name] = value
    return out


def rename(state, pairs):
    for old, new in pairs:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


HUGGING_FACE = [
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed.proj", "embeddings.patch_embeddings.projection"),
    (r"^head", "classifier"),
    (r"^norm", "layernorm"),
]
SELF_ATTENTION = [
    (r"attention.q\.", "attention.query."),
    (r"attention.k\.", "attention.key."),
    (r"attention.v\.", "attention.value."),
    (r"attn.proj", "attention.output.dense"),
    (r"^blocks", "encoder.layer"),
]


def as_hugging_face(state, prefix="vit."):
    state = split_qkv(state, "blocks.{i}.attention.attention.{part}")
    layers = [
        (r"mlp.fc1", "intermediate.dense"),
        (r"mlp.fc2", "output.dense"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
    ]
    state = rename(state, HUGGING_FACE + SELF_ATTENTION + layers + [(r"^(?!classifier)", prefix)])
    return state | {prefix + "pooler.dense.weight": torch.zeros(2, 2)}


def as_transformers_5(state):
    state = split_qkv(state, "blocks.{i}.attention.{part}_proj")
    layers = [
        (r"attn.proj", "attention.o_proj"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"^blocks", "layers"),
    ]
    return rename(state, HUGGING_FACE + layers + [(r"^(?!classifier)", "vit.")])


def as_dinov2_of_hugging_face(state):
    state = split_qkv(state, "blocks.{i}.attention.attention.{part}")
    scale = [(r"ls(\d).gamma", r"layer_scale\1.lambda1")]
    state = rename(state, HUGGING_FACE + SELF_ATTENTION + scale)
    return state | {"embeddings.mask_token": torch.zeros(1, 32)}


FLAX = [
    (r"^blocks.(\d+)", r"Transformer/encoderblock_\1"),
    (r"^norm", "Transformer/encoder_norm"),
    (r"^patch_embed.proj", "embedding"),
    (r"^pos_embed", "Transformer/posembed_input/pos_embedding"),
    (r"^cls_token", "cls"),
    (r"attn.proj", "MultiHeadDotProductAttention_1/out"),
    (r"attn.q\b", "MultiHeadDotProductAttention_1/query"),
    (r"attn.k\b", "MultiHeadDotProductAttention_1/key"),
    (r"attn.v\b", "MultiHeadDotProductAttention_1/value"),
    (r"mlp.fc1", "MlpBlock_3/Dense_0"),
    (r"mlp.fc2", "MlpBlock_3/Dense_1"),
    (r"norm1.weight", "LayerNorm_0/scale"),
    (r"norm1", "LayerNorm_0"),
    (r"norm2.weight", "LayerNorm_2/scale"),
    (r"norm2", "LayerNorm_2"),
    (r"norm.weight", "norm/scale"),
    (r"weight", "kernel"),
    (r"\.", "/"),
]


def as_flax(state, heads=2):
    out = {}
    for name, value in split_qkv(state, "blocks.{i}.attn.{part}").items():
        if name.endswith("weight") and "norm" not in name:
            if ".attn.proj" in name:
                value = value.T.unflatten(0, (heads, -1))  # (H, D, C)
            elif ".attn." in name:
                value = value.T.unflatten(1, (heads, -1))  # (C, H, D)
            else:
                value = value.permute(2, 3, 1, 0) if value.dim() == 4 else value.T
        elif re.search(r"attn\.[qkv]\.bias", name):
            value = value.unflatten(0, (heads, -1))  # (H, D)
        out[name] = value
    return {name: value.numpy() for name, value in rename(out, FLAX).items()}


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def with_thresholds(state):
    steps = [f"blocks.{i}.{step}_masker.threshold" for i in (0, 1) for step in ("merge", "prune")]
    return state | {name: torch.tensor([0.5]) for name in steps}


def other(state):
    """Weights that nothing must be loaded from."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


# As training scripts save them beside the weights.
FLAGS = {"args": argparse.Namespace(lr=0.1, model="vit"), "epoch": 3}

FORMATS = {
    "timm": dict,
    "deit": lambda state: {"model": state},
    "the authors'": lambda state: {"model": with_thresholds(state)},
    "ddp": lambda state: {"state_dict": with_prefix("module.", state), "epoch": 3},
    "compiled": lambda state: {"model": with_prefix("_orig_mod.", state)},
    "lightning": lambda state: {"state_dict": with_prefix("model.", state), "epoch": 3},
    "lightning, compiled": lambda state: {"state_dict": with_prefix("model._orig_mod.", state)},
    "deit, average": lambda state: FLAGS | {"model": other(state), "model_ema": state},
    "timm, average": lambda state: FLAGS | {"state_dict": other(state), "state_dict_ema": state},
    "timm, average alone": lambda state: {"state_dict_ema": with_prefix("module.", state)},
    "hugging face": as_hugging_face,
    "hugging face, deit": lambda state: as_hugging_face(state, "deit."),
    "hugging face, 5": as_transformers_5,
    "half precision": lambda state: {name: w.half() for name, w in state.items()},
}


@pytest.mark.parametrize("library", FORMATS)
def test_every_format_gives_the_same_logits(library, tmp_path):
    state = random_state()
    # The content counts, not the name.
    torch.save(FORMATS[library](state), tmp_path / "weights.safetensors")
    assert torch.equal(logits(str(tmp_path / "weights.safetensors")), logits(state))


def test_flax_npz_gives_the_same_logits(tmp_path):
    state = random_state()
    with open(tmp_path / "weights.bin", "wb") as file:
        np.savez(file, **as_flax(state), **{"pre_logits/bias": np.zeros(2)})
    assert torch.equal(logits(tmp_path / "weights.bin"), logits(state))


def test_a_file_without_checksums_is_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    torch.save(random_state(), tmp_path / "w.pth")
    torch.serialization.set_crc32_options(True)
    assert torch.equal(logits(tmp_path / "w.pth"), logits(random_state()))


def test_safetensors_gives_the_same_logits_or_names_the_package(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = random_state(), tmp_path / "weights.pth"
    safetensors.save_file(state, path)
    assert torch.equal(logits(path), logits(state))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(path)


@pytest.mark.parametrize("write", [dict, as_dinov2_of_hugging_face])
def test_dinov2_gives_the_same_features(write):
    options = {"layer_scale": True, "num_classes": 0}
    state = random_state(**options)
    source = write(state) | {"mask_token": torch.zeros(1, 32)}
    assert torch.equal(logits(source, **options), logits(state, **options))


def test_deit_iii_gives_the_same_logits():
    state = random_state(layer_scale=True)
    # DeiT-III adds no position to the class token.
    state["pos_embed"][:, 0] = 0
    source = rename(state, [(r"ls(\d).gamma", r"gamma_\1")])
    source["pos_embed"] = state["pos_embed"][:, 1:]
    assert "blocks.1.gamma_2" in source
    assert torch.equal(logits(source, layer_scale=True), logits(state, layer_scale=True))


REGISTERS = {"prefix_tokens": 5, "layer_scale": True, "num_classes": 0}
DISTILLED = {"prefix_tokens": 2, "head_tokens": 2}


def with_registers(state, name="register_tokens"):
    """cls_token (1, 5, C) as a class token and registers; positions stay for all of them."""
    return state | {"cls_token": state["cls_token"][:, :1], name: state["cls_token"][:, 1:]}


def with_two_heads(state):
    """As timm writes a distilled DeiT: the two halves of head.weight, twice, are two heads."""
    parts = (state["cls_token"][:, :1], state["cls_token"][:, 1:])
    one, other = (2 * state["head.weight"]).chunk(2, 1)
    state = state | {"cls_token": parts[0], "dist_token": parts[1], "head.weight": one}
    return state | {"head_dist.weight": other, "head_dist.bias": state["head.bias"]}


def without_positions(state, first, last):
    """Prefix tokens from first to last - 1 have no position."""
    positions = state["pos_embed"]
    return state | {"pos_embed": torch.cat([positions[:, :first], positions[:, last:]], 1)}


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("name", ["reg_token", "register_tokens", "embeddings.register_tokens"])
def test_registers_are_prefix_tokens(name, first):
    """Positions are there for all tokens, for the class token and patches, or for patches alone."""
    state = random_state(**REGISTERS)
    state["pos_embed"][:, first:5] = 0
    source = without_positions(with_registers(state, name), first, 5)
    if name.startswith("embeddings."):
        source = with_prefix("dinov2_with_registers.", as_dinov2_of_hugging_face(source))
    assert torch.equal(logits(source, **REGISTERS), logits(state, **REGISTERS))
    resized = load(source, make_model(image_size=20, **REGISTERS)).pos_embed
    assert resized.shape[1] == 30 and torch.equal(resized[:, :5], state["pos_embed"][:, :5])


def test_the_two_heads_of_a_distilled_deit_are_averaged():
    state = random_state(**DISTILLED)
    source = with_two_heads(state) | {"head_dist.bias": torch.arange(5.0)}
    features = logits(source, **DISTILLED | {"num_classes": 0}).chunk(2, 1)
    heads = [
        torch.nn.functional.linear(x, source[f"{head}.weight"], source[f"{head}.bias"])
        for head, x in zip(("head", "head_dist"), features, strict=True)
    ]
    torch.testing.assert_close(logits(source, **DISTILLED), (heads[0] + heads[1]) / 2)
    hugging_face = rename(
        as_hugging_face(source, "deit."),
        [
            (r"deit.dist_token", "deit.embeddings.distillation_token"),
            (r"deit.head_dist", "distillation_classifier"),
            (r"^classifier", "cls_classifier"),
        ],
    )
    assert torch.equal(logits(hugging_face, **DISTILLED), logits(source, **DISTILLED))


def test_what_does_not_fit_together_is_refused_in_one_line():
    state = with_two_heads(random_state(**DISTILLED))
    for change in ({"dist_token": torch.zeros(1)}, {"head_dist.weight": torch.zeros(3, 3)}):
        assert "do not fit together" in refusal(state | change)
    del state["head_dist.bias"]
    assert "do not fit together" in refusal(state)


def test_another_number_of_prefix_tokens_is_refused():
    for options, found in ((REGISTERS, 5), (DISTILLED, 2)):
        with pytest.raises(ValueError, match=f"the weights have {found}, the model has 1 prefix"):
            load(random_state(**options), make_model())


# What timm 1.0.31 gives for IMAGE with the weights of sine_state.
TIMM = {
    "deit3": ({"layer_scale": True}, [-0.76553, 0.43712, 0.06425, -2.11425, 1.47298]),
    "distilled": (DISTILLED, [-0.95147, -2.76928, 0.61351, -0.83752, -0.95393]),
    "registers": (REGISTERS | {"num_classes": 5}, [-0.82918, 0.71958, 0.08731, -2.29521, 1.47352]),
}


def sine_state(**changes):
    state = make_model(**changes).state_dict()
    for name, value in state.items():
        numbers = torch.arange(value.numel(), dtype=torch.float64).square() * 0.37 + len(name)
        state[name] = numbers.sin().float().view_as(value) / 2
    return state


def as_timm(kind):
    options, _ = TIMM[kind]
    state, P = sine_state(**options), options.get("prefix_tokens", 1)
    if kind == "distilled":
        return with_two_heads(state)
    state = without_positions(state, 0, P)
    return with_registers(state, "reg_token") if P > 1 else state


@pytest.mark.parametrize("kind", TIMM)
def test_timm_gives_the_same_logits(kind):
    options, recorded = TIMM[kind]
    found = logits(as_timm(kind), **options)[0]
    torch.testing.assert_close(found, torch.tensor(recorded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("fc_norm.weight", "mean of the patches"),
        ("attn_pool.kv.weight", "pools the patches by attention"),
        ("blocks.0.attn.q_norm.weight", "normalizes its queries"),
        ("blocks.0.attn.k_norm.weight", "normalizes its queries"),
        ("norm_pre.weight", "a norm before its first block"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.0.mlp.w12.weight", "a gated MLP"),
    ],
)
def test_other_kinds_of_models_are_named(name, kind, tmp_path):
    torch.save(random_state() | {name: torch.zeros(1)}, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert kind in message and "only a plain ViT that classifies by its class token" in message
    assert "w.pth" in message and name in message


@pytest.mark.parametrize(
    "name, kind",
    [("cls_token", "without a class token"), ("pos_embed", "without learned positions")],
)
def test_a_model_without_what_every_vit_has_is_named(name, kind):
    state = random_state()
    del state[name]
    assert kind in refusal(state)


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema"])
def test_an_average_is_named_when_it_is_loaded(average, tmp_path, capsys):
    state, path = random_state(), tmp_path / "w.pth"
    plain = {average.removesuffix("_ema"): other(state)}
    for saved in (plain | {average: state}, {average: state}, plain):
        torch.save(saved, path)
        found = models.read_weights("tiny", str(path))
        is_average = average in saved
        assert torch.equal(found["norm.weight"], state["norm.weight"]) == is_average
        line = f"note: the weights are the average that {path} holds as {average}\n"
        assert capsys.readouterr().err == line * is_average


def test_a_prefix_of_some_names_is_not_stripped():
    """Two models may be in one checkpoint: a student, and a teacher of the same names."""
    teacher = with_prefix("model.", other(random_state()))
    assert set(weights.read_checkpoint(random_state() | teacher)) == {*random_state(), *teacher}


# --------------------------------------------------------------------------------------------------
# Made to fit the model


@pytest.mark.parametrize("size", [20, 8])
def test_positions_are_resized_to_another_grid(size):
    state = random_state()
    model = load(state, make_model(image_size=size))
    assert model.pos_embed.shape[1] == (size // 4) ** 2 + 1
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize("size", [24, 7])
def test_positions_are_resized_as_pillow_resizes_pictures(size):
    """Pillow's bicubic is anti-aliased too."""
    grid = torch.randn(14, 14, generator=torch.Generator().manual_seed(0))
    pos_embed = torch.cat([torch.zeros(1), grid.flatten()]).view(1, 197, 1)
    resized = weights.resize_positions(pos_embed, size * size + 1)[0, 1:, 0].view(size, size)
    expected = Image.fromarray(grid.numpy()).resize((size, size), Image.Resampling.BICUBIC)
    torch.testing.assert_close(resized, torch.from_numpy(np.array(expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_positions_without_a_square_grid_are_refused(count):
    with pytest.raises(ValueError, match="not those of a class token and a square grid"):
        weights.resize_positions(torch.zeros(1, count, 32), 10)


def test_a_new_head_is_the_models_own():
    state, model = random_state(), make_model(num_classes=7)
    with pytest.raises(ValueError, match="head.weight"):
        load(state, model)
    headless = {name: w for name, w in state.items() if not name.startswith("head.")}
    for source in (state, headless):
        head = model.head.weight.clone()
        assert torch.equal(load(source, model, new_head=True).head.weight, head)
    same_classes = load(state, make_model(), new_head=True)
    assert torch.equal(same_classes.head.weight, state["head.weight"])
    no_classes = load(state, make_model(num_classes=0), new_head=True)
    assert torch.equal(no_classes.norm.weight, state["norm.weight"])


# --------------------------------------------------------------------------------------------------
# Files that are refused


def write_torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def write_old_tar(path):
    """What torch wrote before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NO_CHECKPOINTS = {
    "absent": (lambda path: None, "no checkpoint at"),
    "text": (
        lambda path: path.write_text('{"a": 1}'),
        "is no checkpoint, or .*: Unsupported operand",
    ),
    "empty": (lambda path: path.write_text(""), "is no checkpoint, or damaged"),
    "list": (lambda path: torch.save([1, 2], path), "holds no state dict"),
    "code": (lambda path: torch.save({"model": random.Random()}, path), "could run code"),
    "tar": (write_old_tar, "legacy .tar format"),
    "pointer": (lambda path: path.write_text(POINTER), "git-lfs pointer.*: run git lfs pull"),
    "torchscript": (write_torchscript, "is TorchScript.*: save its state dict alone"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints_are_named(name, tmp_path):
    write, reason = NO_CHECKPOINTS[name]
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message and re.search(reason, message)
    # torch's advice would have any file loaded.
    assert "PyTorch 2.6" not in message and "trust" not in message


def save_torch(state, path):
    torch.save({"model": state}, path)


def save_old_torch(state, path):
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)


def save_npz(state, path):
    with open(path, "wb") as file:
        np.savez(file, **as_flax(state))


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path)


def damage(content, rng, how):
    """Cut off, or with flipped bits anywhere, or near the start -> content, first changed byte."""
    damaged = bytearray(content)
    if how == "cut off":
        del damaged[rng.randrange(len(content)) :]
        return damaged, len(damaged)
    end = len(content) if how == "flipped" else min(len(content), 512)
    places = [rng.randrange(end) for _ in range(rng.choice([1, 1, 1, 4, 16]))]
    for place in places:
        damaged[place] ^= 1 << rng.randrange(8)
    return damaged, min(places)


def peak_memory(run):
    """MB that run() needs at its peak beyond what was there before; 0 where nobody tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = Path("/proc/self/status").read_text()
    except OSError:
        run()
        return 0
    run()
    after = Path("/proc/self/status").read_text()
    rss = int(re.search(r"VmRSS:\s+(\d+)", before)[1])
    peak = int(re.search(r"VmHWM:\s+(\d+)", after)[1])
    return (peak - rss) / 1024


LONG = pytest.param(int(os.environ.get("LTMP_FUZZ", "1000")), marks=pytest.mark.slow, id="long")


@pytest.mark.parametrize("count", [pytest.param(15, id="short"), LONG])
@pytest.mark.parametrize("save", [save_torch, save_old_torch, save_npz, save_safetensors])
def test_damaged_files_are_refused_in_one_line_or_hold_what_was_saved(save, count, tmp_path):
    """Three times count files. Without checksums other numbers may come out, but nothing else."""
    path, rng, refused = tmp_path / "file", random.Random(save.__name__), 0
    state = random_state()
    save(state, path)
    content = path.read_bytes()
    guarded = len(content)
    if save is save_old_torch:
        guarded = 0
    if save is save_safetensors:
        # Only the header is read with care.
        guarded = 8 + int.from_bytes(content[:8], "little")

    def fuzz():
        nonlocal refused
        for i in range(3 * count):
            how = ("cut off", "flipped", "flipped near the start")[i % 3]
            damaged, first = damage(content, rng, how)
            path.write_bytes(damaged)
            try:
                found = load(path, make_model()).state_dict()
            except ValueError as error:
                assert type(error) is ValueError and "\n" not in str(error)
                refused += 1
            else:
                equal = all(torch.equal(found[name], w) for name, w in state.items())
                assert equal or (how != "cut off" and first >= guarded), (i, first)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = peak_memory(fuzz)
    assert refused and used < 300


# --------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return Path(torch.hub.get_dir()) / "checkpoints"


def published(folder, name="vit-{}.pth"):
    """The URL of random_state in a file whose name holds the start of its hash."""
    folder.mkdir(exist_ok=True)
    torch.save({"model": random_state()}, folder / "w")
    digits = hashlib.sha256((folder / "w").read_bytes()).hexdigest()[:8]
    path = (folder / "w").rename(folder / name.format(digits))
    return path, path.as_uri()


def test_a_url_is_downloaded_once(tmp_path, hub):
    path, url = published(tmp_path)
    first = logits(url)
    path.unlink()
    assert torch.equal(first, logits(random_state())) and torch.equal(logits(url), first)


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, hub):
    _, url = published(tmp_path, "vit-00000000.pth")
    message = refusal(url)
    assert "cannot download" in message and "hash" in message
    assert not list(hub.iterdir())


def test_files_of_one_name_at_two_urls_are_two_downloads(tmp_path, hub):
    urls = [published(tmp_path / folder, "w.pth")[1] for folder in ("one", "other")]
    first, second = map(weights.download, urls)
    assert first != second and first.exists() and second.exists()


def test_official_weights(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match="no official weights are known for vit_tiny"):
        weights.official_weights("vit_tiny_patch16_224")
    _, url = published(tmp_path)
    monkeypatch.setitem(weights.WEIGHTS, "deit_tiny_patch16_224", url)
    assert torch.equal(logits(weights.official_weights("deit_tiny_patch16_224")), logits(url))


@pytest.mark.parametrize("url", ["file:///nowhere/w-a1311bcf.pth", "http://localhost/two words"])
def test_official_weights_without_network(url, hub, monkeypatch):
    monkeypatch.setitem(weights.WEIGHTS, "deit_tiny_patch16_224", url)
    with pytest.raises(ValueError, match="cannot download .* pass the file"):
        weights.official_weights("deit_tiny_patch16_224")
