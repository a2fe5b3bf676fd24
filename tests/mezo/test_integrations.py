"""Adapters of peft and the Trainer of transformers, on tiny random models made on the spot."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import DEFAULT_EPS, MeZO, default_eps, lora, noise, prefix, replay

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # Notices of the libraries about themselves; none concerns what is tested here.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
VOCABULARY = 60


def tiny(kind: str = "opt") -> nn.Module:
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
    if kind == "opt":
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 32}
        config = transformers.OPTConfig(
            num_hidden_layers=2, num_attention_heads=4, dropout=0.1, **sizes, **ends
        )
        return transformers.OPTForCausalLM(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **ends)
        ).eval()
    if kind == "llama":
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_hidden_layers=2, **sizes, **ends)
        ).eval()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    return transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(num_hidden_layers=2, **sizes, **ends)
    ).eval()


def tokens(rows: int = 4, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "roberta"])
def test_lora_starts_as_the_base_and_trains_a_and_b_alone(kind: str) -> None:
    base, ids = tiny(kind), tokens()
    model = lora(copy.deepcopy(base), r=2, alpha=4).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    names = trained_names(model)
    assert names and all("lora_A" in n or "lora_B" in n for n in names)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MeZO(model.named_parameters(), 0.05, default_eps(model))
    for _ in range(3):
        optimizer.step(lambda: language_loss(model, ids))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in names), name


def test_lora_of_opt_has_the_papers_shape() -> None:
    model = lora(tiny())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 2 * 8 * 16
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (8, 16, {"q_proj", "v_proj"})


def test_lora_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (lora(nn.Sequential(nn.Linear(6, 6)), targets=["0"], seed=seed) for seed in (1, 1, 2))
    first = [next(p for n, p in m.named_parameters() if "lora_A" in n) for m in (a, b, c)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    lora_only = torch.get_rng_state()
    nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
    torch.set_rng_state(state)
    [nn.Sequential(nn.Linear(6, 6)) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), lora_only), "only the test's own layers moved the global state"


def test_lora_of_an_unknown_module_asks_for_targets() -> None:
    with pytest.raises(ValueError, match="name the linear layers of Sequential.*'0'"):
        lora(nn.Sequential(nn.Linear(3, 3)))


def test_a_frozen_b_is_refused() -> None:
    model = lora(nn.Sequential(nn.Linear(3, 3)), targets=["0"])
    assert default_eps(model) == DEFAULT_EPS["lora"] == 1e-2
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)
    with pytest.raises(ValueError, match="lora_B.*frozen"):
        default_eps(model)


def test_an_adapter_run_is_replayed_onto_a_fresh_adapter() -> None:
    base, ids = tiny(), tokens()
    model = lora(copy.deepcopy(base), seed=4).eval()
    optimizer = MeZO(model.named_parameters(), 0.05, 1e-2)
    for _ in range(3):
        optimizer.step(lambda: language_loss(model, ids))
    again = replay(lora(copy.deepcopy(base), seed=4).eval(), optimizer.log)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="checksum"):
        replay(lora(copy.deepcopy(base), seed=5), optimizer.log)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.decoder.layers[0].fc1.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another base"):
        replay(lora(other, seed=4), optimizer.log)


# ---- prefix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_prefix_starts_as_if_its_tokens_stood_before_the_text(kind: str) -> None:
    """Keys and values of real tokens in every layer: the same logits as with these tokens in the context."""
    base, ids = tiny(kind), tokens()
    state = torch.get_rng_state()
    model = prefix(copy.deepcopy(base), 5, seed=3).eval()
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(3)
    before = torch.randint(VOCABULARY, (1, 5), generator=generator).expand(len(ids), 5)
    with torch.no_grad():
        expected = base(input_ids=torch.cat([before, ids], 1)).logits[:, 5:]
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((found - base(input_ids=ids).logits.detach()).abs().max()) > 1e-4, (
        "the prefix makes a difference"
    )
    assert len(trained_names(model)) == 1 and default_eps(model) == DEFAULT_EPS["prefix"] == 1e-1


def test_prefix_trains_and_leaves_the_base_alone() -> None:
    base, ids = tiny(), tokens()
    model = prefix(copy.deepcopy(base)).eval()
    first = float(language_loss(model, ids).detach())
    optimizer = MeZO(model.named_parameters(), 0.3, default_eps(model), n=4)
    for _ in range(60):
        optimizer.step(lambda: language_loss(model, ids))
    with torch.no_grad():
        assert float(language_loss(model, ids)) < first - 1e-3
        for p, q in zip(model.get_base_model().parameters(), base.parameters(), strict=True):
            assert torch.equal(p, q)


def test_random_prefix_is_another_start() -> None:
    weights = [
        prefix(tiny(), 3, init=init).prompt_encoder["default"].embedding.weight
        for init in ("activation", "random")
    ]
    assert weights[0].shape == weights[1].shape == (3, 2 * 2 * 16)
    assert not torch.allclose(*weights)


def test_prefix_refuses_what_has_no_cache() -> None:
    for model in (tiny("roberta"), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="use lora"):
            prefix(model)
    with pytest.raises(ValueError, match="init='zeros'"):
        prefix(tiny(), init="zeros")


# ---- Trainer -------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 24) -> None:
        self.ids = tokens(count)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones_like(self.ids[i]),
            "labels": self.ids[i],
        }


def trainer_of(
    model: nn.Module, folder: Path, *, steps: int = 6, batch: int = 4, mezo: dict | None = None, **options
):
    from papercore.mezo import MeZOTrainer

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        use_cpu=True,
        seed=7,
        **options,
    )
    return MeZOTrainer(model=model, args=arguments, train_dataset=Rows(), mezo=mezo)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()


def test_trainer_takes_mezo_steps(tmp_path: Path) -> None:
    model = tiny()
    base = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, weight_decay=0.1, mezo={"eps": 0.01})
    result = trainer.train()
    log = trainer.mezo_optimizer.log
    assert len(log) == 6 and log.seed == 7
    assert log[0].settings.groups[0] == (0.01, 0.01, 0.1)
    assert result.training_loss == pytest.approx(4.1, abs=0.5)  # ln 60
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6
    again = replay(base, log)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    decays = {row.name: row.decays for row in log.base.table}
    assert decays["model.decoder.layers.0.fc1.weight"] and not decays["model.decoder.layers.0.fc1.bias"]
    assert not decays["model.decoder.final_layer_norm.weight"]


def test_trainer_equals_a_loop_of_ones_own(tmp_path: Path) -> None:
    """The same batches in the same order, dropout off: the same bits."""
    model = tiny()
    mine = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, mezo={"eps": 0.01})
    batches = []
    step = trainer.training_step
    trainer.training_step = lambda m, inputs, *a, **k: (
        batches.append(inputs["input_ids"]),
        step(m, inputs, *a, **k),
    )[1]
    trainer.train()
    optimizer = MeZO(mine.named_parameters(), 0.01, 0.01, seed=7)
    for ids in batches:
        optimizer.step(lambda: language_loss(mine, ids))  # noqa: B023
    assert len(batches) == 6
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), model.parameters(), strict=True))


def test_trainer_accumulates_micro_batches(tmp_path: Path) -> None:
    slopes = []
    for size, parts in ((4, 2), (8, 1)):
        options = {"steps": 3, "batch": size, "gradient_accumulation_steps": parts, "mezo": {"eps": 0.05}}
        trainer = trainer_of(tiny(), tmp_path, **options)
        trainer.train()
        assert len(trainer.mezo_optimizer.log) == 3
        slopes.append(trainer.mezo_optimizer.log.projected_grads)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pipelined", [False, True])
def test_trainer_resumes_from_a_checkpoint(tmp_path: Path, pipelined: bool) -> None:
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "mezo": {"eps": 0.01, "momentum": 0.9, "pipelined": pipelined},
    }
    straight = trainer_of(tiny(), tmp_path / "a", **options)
    straight.train()
    resumed = trainer_of(tiny(), tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert len(resumed.mezo_optimizer.log) == 6
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.mezo_optimizer.log.to_bytes() == straight.mezo_optimizer.log.to_bytes()


def test_trainer_takes_the_adapters_eps_and_evaluates(tmp_path: Path) -> None:
    model = lora(tiny(), r=2)
    trainer = trainer_of(model, tmp_path, steps=2, mezo={"pipelined": True, "dist": "rademacher"})
    trainer.train()
    assert trainer.mezo_optimizer.log[0].settings.groups[0].eps == 1e-2
    assert not trainer.mezo_optimizer._moves.away
    assert trainer.evaluate(Rows(4))["eval_loss"] == pytest.approx(4.1, abs=0.5)


def test_the_extra_is_named_when_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"papercore\[hf\]"):
        lora(nn.Linear(2, 2), targets=["0"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "papercore.mezo.trainer", raising=False)
    with pytest.raises(ImportError, match=r"papercore\[hf\]"):
        importlib.import_module("papercore.mezo.trainer")


def test_noise_of_an_adapter_is_numbered_by_the_adapter() -> None:
    """Frozen weights take no indices: the first trained element has index 0."""
    model = lora(nn.Sequential(nn.Linear(6, 6, bias=False)), r=2, targets=["0"])
    a = next(p for n, p in model.named_parameters() if "lora_A" in n)
    before, seen = a.detach().clone(), []
    optimizer = MeZO(model.parameters(), 0.0, 0.5, seed=1)
    optimizer.step(lambda: seen.append(a.detach().clone()) or 0.0)
    z = noise(optimizer.log[0].seeds[0], 0, a.numel()).reshape(a.shape)
    torch.testing.assert_close(seen[0], before + 0.5 * z)
