"""README.md and docs/: their examples run, and what they name is there."""

import contextlib
import csv
import io
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ltmp
from ltmp import ThresholdMasker, Tokens

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
DOCS = [README, *(path.read_text() for path in sorted((HERE / "docs").glob("*.md")))]
MEASURED = ("top1", "kl", "r")
# An editable install maps ltmp_extras to extras/; a plain checkout has extras/ alone.
sys.modules.setdefault("ltmp_extras", __import__("extras"))


def code_block(text, start):
    """The first block of Python in text that holds start."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return next(block for block in blocks if start in block)


def layer_and_tokens():
    torch.manual_seed(0)
    options = {"activation": "gelu", "norm_first": True, "batch_first": True}
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, **options).eval()
    x = torch.randn(3, 18, 32)
    rows = torch.arange(54).view(3, 18)
    tokens = Tokens(x.flatten(0, 1), torch.ones(54), torch.ones(54), rows, rows >= 0)
    return layer, x, tokens


@torch.no_grad()
def test_the_example_of_another_vit():
    names = {}
    exec(code_block(README, "def reduced_layer"), names)
    reduced = names["reduced_layer"]
    layer, x, tokens = layer_and_tokens()
    off = ThresholdMasker(1.0, 0.1), ThresholdMasker(0.0, 0.1)
    # Where nothing merges, the order is: set A, set B.
    order = [*range(0, 18, 2), *range(1, 18, 2)]
    for start in (tokens, replace(tokens, mask=None)):
        same = reduced(layer, start, *off)
        torch.testing.assert_close(same.x[same.rows], layer(x)[:, order])
    on = ThresholdMasker(0.3, 0.1), ThresholdMasker(0.05, 0.1)
    masked = reduced(layer, tokens, *on)
    dropped = reduced(layer, replace(tokens, mask=None), *on)
    only_merged = reduced(layer, tokens, on[0], off[1])
    assert torch.equal(masked.kept(), dropped.kept())
    assert (dropped.kept() < only_merged.kept()).any() and only_merged.kept().max() < 18
    torch.testing.assert_close(masked.x[masked.rows[masked.live]], dropped.x)


def test_the_example_of_a_product(tmp_path, monkeypatch):
    from ltmp_extras import weights

    model = ltmp.create_model("deit_small_patch16_224", depth=12)
    torch.save({"model": model.state_dict()}, tmp_path / "deit.pth")
    monkeypatch.setitem(weights.WEIGHTS, "deit_small_patch16_224", str(tmp_path / "deit.pth"))
    (tmp_path / "deit").mkdir()
    numbers = ", ".join(["0.9"] * 12)
    (tmp_path / "deit" / "thresholds.json").write_text(
        f'{{"method": "ltmp", "merge_thresholds": [{numbers}], "prune_thresholds": [{numbers}]}}'
    )
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.randn(1, 3, 224, 224)}
    exec(code_block(README, "ltmp_extras"), names)
    assert names["logits"].shape == (1, 1000) and names["kept"].shape == (12, 1)


def test_the_walk_through_prints_its_numbers(monkeypatch):
    monkeypatch.chdir(HERE)
    method = (HERE / "docs" / "method.md").read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code_block(method, "def tell"), {})
    shown = method.split(code_block(method, "def tell"))[1]
    assert shown.startswith(f"```\n\n```\n{printed.getvalue()}```\n")
    # The explanation below counts with the same numbers.
    lines = [line.split() for line in printed.getvalue().splitlines()]
    (scores, *_, merged, _, _), (patches, *_, stay, _, _), (before, *_, after, _, _) = lines
    left = int(before) - int(merged)
    assert left == int(patches) + 1 and int(stay) + 1 == int(after)
    assert 0 < int(merged) < int(scores) and 0 < int(stay) < int(patches)
    said = " ".join(shown.split())
    for words in (
        f"{before} tokens come into the block: the class token, {scores} in set A",
        f"there are {scores} similarities. {merged} tokens merge, and {before} - {merged} = {left}",
        f"there are {patches} importances. {stay} of these tokens stay",
        f"{int(patches) - int(stay)} are pruned. With the class token {after} go on to the MLP",
    ):
        assert words in said, words


def test_the_table_of_the_frontier_is_that_of_the_csv():
    with open(HERE / "demo" / "frontier.csv") as file:
        runs = list(csv.DictReader(file))

    def cell(method, target):
        own = [run for run in runs if (run["method"], run["target"]) == (method, target)]
        top1, kl, r = (statistics.mean(float(run[key]) for run in own) for key in MEASURED)
        return f"{top1:.2f}, {kl:.2g} at {r:.3f}"

    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| target |"))
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines[start : start + 9]]
    rows = rows[: next((i for i, row in enumerate(rows) if row == [""]), len(rows))]
    assert len(rows) >= 4
    for first, *cells in rows:
        assert cells == [cell(first, target) for target in head[1:]], first


def test_tests_that_are_named_are_there():
    named = set(re.findall(r"`(test_\w+)`", "\n".join(DOCS)))
    tests = "\n".join(path.read_text() for path in HERE.glob("**/test_*.py"))
    assert len(named) > 10
    assert [name for name in named - {"test_ltmp"} if f"def {name}(" not in tests] == []


def test_links_lead_somewhere():
    for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), link


PROGRAMS = ["train.py", "evaluate.py", "flops.py"]
PROGRAMS += [f"-m experiments.{name}" for name in ("pictures", "benchmark", "frontier", "export")]
PROGRAMS += ["-m experiments.make_demo vit"]


def test_every_program_that_is_run_is_looked_at():
    run = re.findall(r"(?:python |\d )(\w+\.py|-m experiments\.\w+(?: vit)?)", "\n".join(DOCS))
    assert len(run) > 10 and set(run) <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_that_are_used_exist(program):
    used = set()
    for command in re.findall(rf"{re.escape(program)}( [^\n`|#]*)", "\n".join(DOCS)):
        used |= set(re.findall(r"(?<= )--?[a-z][a-z-]*", command))
    command = [sys.executable, *program.split(), "--help"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))
    assert used <= known, used - known


def test_the_readme_is_five_minutes():
    assert README.count("\n") <= 200 and len(README.split()) <= 1500
