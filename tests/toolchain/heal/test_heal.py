"""Healing: what is learnt, that it can be interrupted anywhere, and that the checkpoint keeps its form."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.command_line import PLAIN, refused, sentei
from tests.conftest import prune_by_hand
from tests.families import VARIANTS, make_family_pico
from tests.quantized import write_quantized
from tests.toolchain.heal.stopping import Stop, stopping_at
from toolchain.checkpoint.directory import open_checkpoint, same_bits, write_config, write_weights
from toolchain.heal import heal as heal_module
from toolchain.heal.distillation import Looks, Training, distill, divergence, order_of_windows
from toolchain.heal.heal import HealSettings, heal
from toolchain.metrics.perplexity import perplexity
from toolchain.model.disk_layers import open_walk
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import load_plan
from toolchain.progress import Listener
from toolchain.ranks import ranks
from toolchain.text.embedded import documents
from toolchain.text.sources import TextSource

SETTINGS = ("--steps", 10, "--batch-size", 2, "--seq-len", 16, "--dtype", "float32", "--quiet")


def healed(pruned: Path, original: Path, out: Path, text: Path, *more: object):
    return sentei("heal", pruned, "--against", original, "--data", text, "-o", out, *SETTINGS, *more)


@pytest.mark.parametrize("more", [("--lora-rank", 4, "--learning-rate", 0.003), ("--full", "--learning-rate", 0.001)])
def test_it_comes_closer_and_keeps_its_form(
    pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path, more: tuple
):
    done = healed(pruned_pico, pico_model, out := tmp_path / "out", text, "--json", *more)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["divergence_after"] < 0.97 * result["divergence_before"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    before, after = open_checkpoint(pruned_pico), open_checkpoint(out)
    assert (out / "config.json").read_bytes() == (pruned_pico / "config.json").read_bytes()
    assert {n: (i.shape, i.dtype) for n, i in before.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in after.tensors.items()
    }
    changed = {name for name in before.tensors if not same_bits(before.read(name), after.read(name))}
    if "--full" in more:
        assert changed >= {"model.norm.weight", "lm_head.weight"}
    else:
        assert changed == {name for name in before.tensors if ".layers." in name and "_proj." in name}

    plan = load_plan(out)
    assert [record.lora_rank for record in plan.document.healing] == [None if "--full" in more else 4]
    assert plan.layout == load_plan(pruned_pico).layout
    assert "## Healed" in (out / "README.md").read_text()
    assert "healed: 10 steps towards pico" in sentei("plan", "show", out).stdout
    assert sentei("export", "vllm", out, "-o", tmp_path / "deploy", "--quiet").returncode == 0
    # The plan itself says what was removed; applied again, it gives the model before it was healed.
    assert sentei("apply", out, pico_model, "-o", tmp_path / "again", "--quiet").returncode == 0
    assert open_checkpoint(tmp_path / "again").fingerprint == before.fingerprint
    assert load_plan(tmp_path / "again").document.healing == []


def test_a_models_own_sampling_is_kept_and_does_not_stop_it(pico_model, pruned_pico, text, tmp_path):
    """Most chat models say how they are to be sampled; all weights are saved on the way."""
    source = tmp_path / "source"
    shutil.copytree(pruned_pico, source)
    said = json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": 2})
    (source / "generation_config.json").write_text(said)
    done = healed(source, pico_model, out := tmp_path / "out", text, "--full", "--learning-rate", 0.001)
    assert done.returncode == 0, done.stderr
    assert (out / "generation_config.json").read_text() == said


@pytest.mark.parametrize("lora_rank", [4, pytest.param(None, marks=pytest.mark.acceptance)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path, lora_rank: int | None
):
    settings = HealSettings(
        data=[TextSource(text)], steps=10, batch_size=2, seq_len=16, learning_rate=0.001, lora_rank=lora_rank, seed=1,
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    paths = (pruned_pico, pico_model)
    heal(*paths, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        heal(*paths, out := tmp_path / "out", settings, listener=Listener(progress=stopping_at(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]  # nothing to go on from

    with pytest.raises(Stop):
        heal(*paths, out, settings, listener=Listener(progress=stopping_at(4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.heal", "whole"]
    # As if the interruption had come while the next checkpoint was being written.
    (unfinished := tmp_path / "out.heal" / "checkpoint-4").mkdir()
    (unfinished / "trainer_state.json").write_text('{"global_')
    command = ("heal", pruned_pico, "--against", pico_model, "--data", text, "-o", out, *SETTINGS, "--seed", 1)
    rank = ("--lora-rank", lora_rank) if lora_rank else ("--full",)
    refused(sentei(*command, *rank, "--learning-rate", 0.001), "interrupted healing", "--resume")
    refused(sentei(*command, *rank, "--learning-rate", 0.002, "--resume"), "another learning_rate: 0.001 then")
    # Trained to the end, and interrupted while the second tensor is written.
    with pytest.raises(Stop):
        heal(*paths, out, settings, resume=True, listener=Listener(progress=stopping_at(12)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.heal", "whole"]
    done = sentei(*command, *rank, "--learning-rate", 0.001, "--resume")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert open_checkpoint(out).fingerprint == open_checkpoint(tmp_path / "whole").fingerprint
    assert (out / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


@pytest.mark.parametrize("lora_rank", [4, None])
def test_little_memory_changes_nothing_but_time(
    pico_model: Path, pruned_pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int | None
):
    windows = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    training = Training(
        steps=2, batch_size=2, learning_rate=0.02, lora_rank=lora_rank, seed=0, device="cpu", dtype=torch.float32
    )
    source, teacher = open_checkpoint(pruned_pico), load_model(pico_model)
    plain = distill(teacher, source, windows, training, tmp_path / "plain")
    monkeypatch.setattr(ranks, "available_bytes", lambda device: 10_000)
    short = distill(teacher, source, windows, training, tmp_path / "short")
    assert [each.model.is_gradient_checkpointing for each in (plain, short)] == [False, True]
    for name in source.tensors:
        assert torch.allclose(plain.read(name), short.read(name), atol=1e-6), name


@pytest.mark.parametrize("family", VARIANTS)
def test_merged_weights_say_what_the_adapters_said(family: str, tmp_path: Path):
    for variant in list(VARIANTS[family])[:2]:  # the others differ in what has no weights
        make_family_pico(original := tmp_path / variant, family, variant)
        (pruned := tmp_path / f"{variant}-pruned").mkdir()
        prune_by_hand(original, pruned, removed_attention={1}, width=lambda layer: 32 + 4 * layer)
        windows = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
        training = Training(
            steps=3, batch_size=2, learning_rate=0.02, lora_rank=4, seed=0, device="cpu", dtype=torch.float32
        )
        source = open_checkpoint(pruned)
        student = distill(load_model(original), source, windows, training, tmp_path / f"{variant}-training")
        (merged := tmp_path / f"{variant}-merged").mkdir()
        write_config(merged, source.config)
        write_weights(merged, {n: (i.shape, i.dtype) for n, i in source.tensors.items()}, student.read)
        with torch.inference_mode():
            wanted, found, before, teacher = (
                model.eval()(input_ids=windows, use_cache=False).logits
                for model in (student.model, load_model(merged), load_model(source), load_model(original))
            )
        assert torch.allclose(found, wanted, atol=1e-4), variant
        assert divergence(teacher, found) < 0.98 * divergence(teacher, before), variant


def test_divergence_is_that_of_the_distributions():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert float(divergence(teacher, student)) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert float(divergence(teacher, teacher + 3)) == pytest.approx(0, abs=1e-6)


def test_every_window_is_read_once_before_any_is_read_twice():
    order = order_of_windows(4, 10, seed=0)
    assert len(order) == 10
    assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]
    assert order[:4].tolist() != order[4:8].tolist()


def test_what_does_not_help_is_not_written(pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path):
    done = healed(pruned_pico, pico_model, tmp_path / "out", text, "--full", "--learning-rate", 50)
    assert done.returncode == 1
    # Said after a quarter of the steps: the others could take days.
    assert "did not help: after 3 of 10 steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_only_a_little_worse_is_found_at_the_end(pico_model, pruned_pico, text, tmp_path, monkeypatch):
    monkeypatch.setattr(heal_module, "_HOPELESS", math.inf)
    done = healed(pruned_pico, pico_model, tmp_path / "out", text, "--full", "--learning-rate", 50)
    assert done.returncode == 1, done.stderr
    assert "did not help: on held-out text the divergence from the original was" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_on_the_way_says_what_is_measured_afterwards_and_changes_nothing(
    pico_model: Path, pruned_pico: Path, tmp_path: Path, dtype: torch.dtype
):
    windows = torch.randint(3, 96, (9, 12), generator=torch.Generator().manual_seed(0))
    learnt, held_out = windows[:6], windows[6:]
    # The rate falls to 0 at the end, so the last look, at three quarters, is near to what is found in the end.
    training = Training(steps=12, batch_size=2, learning_rate=0.003, lora_rank=4, seed=0, device="cpu", dtype=dtype)
    source, teacher = open_checkpoint(pruned_pico), load_model(pico_model, dtype=dtype)
    looks: dict[int, float] = {}
    looked = distill(
        teacher, source, learnt, training, tmp_path / "looked", looks=Looks(windows=held_out, on_look=looks.__setitem__)
    )  # fmt: skip
    plain = distill(teacher, source, learnt, training, tmp_path / "plain")
    assert all(torch.equal(looked.read(name), plain.read(name)) for name in source.tensors)
    with torch.inference_mode():
        before, after = (
            float(divergence(*(model.eval()(input_ids=held_out, use_cache=False).logits for model in (teacher, each))))
            for each in (load_model(source, dtype=dtype), looked.model)
        )
    assert list(looks) == [3, 6, 9]
    assert abs(looks[9] - after) < 0.2 * abs(before - after)


def test_bad_input(pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path):
    def refuse(*more: object, pruned: Path = pruned_pico, original: Path = pico_model, data: Path = text, says: str):
        refused(healed(pruned, original, tmp_path / "out", data, *more), says)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.heal").exists()

    refuse(data=tmp_path / "none.txt", says="does not exist")
    (tiny := tmp_path / "tiny.txt").write_text(
        "The gardener prunes the trees in winter, and in summer they bear fruit."
    )
    refuse("--seq-len", 64, data=tiny, says="1 windows of 64 tokens need 64")
    refuse(data=tiny, says="one more has to be held out")
    refuse(pruned=pico_model, says="is not pruned")
    refuse(original=pruned_pico, says="cannot learn from itself")
    refuse("--steps", 0, says="--steps 0")
    refuse("--learning-rate", "nan", says="--learning-rate nan")
    refuse("--lora-rank", 0, says="--lora-rank 0")
    refuse("--full", "--lora-rank", 8, says="one of them")
    refuse("--dtype", "float16", says="float16")

    shutil.copytree(pico_model, other := tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    refuse(original=other, says="another tokenizer")
    shutil.copytree(pruned_pico, planless := tmp_path / "planless")
    (planless / "plan.json").unlink()
    refuse(pruned=planless, says="no plan")
    write_quantized(pruned_pico, rounded := tmp_path / "rounded", "int8")
    refuse(pruned=rounded, says="quantised checkpoints are not supported")


def test_without_peft(pico_model: Path, pruned_pico: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "toolchain.heal.distillation")
    refused(healed(pruned_pico, pico_model, tmp_path / "out", text), "pip install 'sentei[heal]'")


@pytest.mark.acceptance
def test_minutes_recover_a_share_of_the_loss(demo_model: Path, tmp_path: Path):
    *learnt, unseen = documents()[::5]
    (text := tmp_path / "text.txt").write_text("\n\n".join(learnt))
    ids = load_tokenizer(demo_model)(unseen, return_tensors="pt")["input_ids"][:, :512]

    def perplexity_of(model: Path) -> float:
        walk = open_walk(open_checkpoint(model), dtype=torch.float32, device="cpu", offload=False)
        return perplexity(walk, ids).perplexity

    plan = sentei(
        "prune", demo_model, "-o", pruned := tmp_path / "pruned", "--calibration", text, "--samples", 4, "--seq-len",
        256, "--sparsity", 0.25, "--attention-removals", 1, *PLAIN, "--quiet",
    )  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    done = sentei(
        "heal", pruned, "--against", demo_model, "--data", text, "-o", tmp_path / "healed", "--steps", 20,
        "--batch-size", 4, "--seq-len", 256, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert perplexity_of(tmp_path / "healed") < 0.9 * perplexity_of(pruned)
    for kind in ("onnx", "vllm"):
        exported = sentei("export", kind, tmp_path / "healed", "-o", tmp_path / kind, "--quiet")
        assert exported.returncode == 0, exported.stderr
    # An export is compared with its own checkpoint, and must not pass for the one before it was healed.
    assert sentei("verify", tmp_path / "onnx", "--against", tmp_path / "healed", "--quiet").returncode == 0
    assert sentei("verify", tmp_path / "onnx", "--against", pruned, "--quiet").returncode == 1
