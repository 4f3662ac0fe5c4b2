"""The preference losses: slopes, formulas written out, TRL's own code, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from kernel_checks import BACKENDS
from pair_checks import LOSS_CASES, make

from macpo.kernels import linear_logp, pair_loss, sequence_sums
from macpo.kernels.pair_loss.losses import LOSSES, LossSettings, PairScores, sft


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_slopes_are_the_derivatives(case, beta):
    """Against autograd in float64; margins of either sign, near 0 and large, log-probs of confident responses."""
    settings = LossSettings(beta=beta, **LOSS_CASES[case])
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in ([-0.4, -60.0, -3.0, -1e-3, -7.0, -20.0], [-0.9, -2.0, -3.1, -40.0, -6.9, -1e-3])
    )
    tokens = torch.tensor([1.0, 8.0, 3.0, 5.0, 4.0, 9.0]), torch.tensor([2.0, 6.0, 3.0, 1.0, 10.0, 4.0])
    loss, dchosen, drejected = LOSSES[settings.loss](PairScores(chosen, rejected, *tokens), settings)
    expected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    for value, grad in zip((dchosen, drejected), expected, strict=True):
        torch.testing.assert_close(value, grad, rtol=1e-10, atol=1e-12)


def test_conservative_dpo_is_its_formula():
    """cDPO (Mitchell 2023): -(1 - e) log sigma(beta d) - e log sigma(-beta d), written out in float64."""
    tensors, target, cu, ref_logps, _ = make((3, 7, 1, 4, 6, 2), {})
    logp = torch.log_softmax(tensors["hidden"].double() @ tensors["weight"].double().T, -1)
    sums = [logp[cu[i] : cu[i + 1]].gather(1, target[cu[i] : cu[i + 1], None]).sum().item() for i in range(6)]
    beta, eps, total = 0.25, 0.15, 0.0
    for pair in range(3):
        chosen, rejected = (sums[2 * pair + j] - ref_logps[2 * pair + j].item() for j in (0, 1))
        sigma = 1 / (1 + math.exp(-beta * (chosen - rejected)))
        total += -(1 - eps) * math.log(sigma) - eps * math.log(1 - sigma)
    out = pair_loss(tensors["hidden"], tensors["weight"], target, cu, ref_logps, beta=beta, label_smoothing=eps)
    assert abs(out.loss.item() - total / 3) < 1e-5


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("case", ["ld_dpo", "sigmoid_norm", "simpo", "orpo"])
def test_formulas_written_out(case):
    """Each paper's equation in plain Python floats, from float64 log-probs of single tokens."""
    settings = LOSS_CASES[case]
    tensors, target, cu, ref_logps, _ = make((3, 7, 1, 4, 6, 2), {}, loss=settings["loss"])
    logp = torch.log_softmax(tensors["hidden"].double() @ tensors["weight"].double().T, -1)
    logp = logp.gather(1, target[:, None]).squeeze(1)
    beta, total, nll = 0.7, 0.0, 0.0
    for pair in range(3):
        chosen, rejected = (logp[cu[2 * pair + j] : cu[2 * pair + j + 1]].tolist() for j in (0, 1))
        c, r = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
        nll -= c / 3
        if case == "simpo":  # eq. 6
            total += -math.log(sigma(beta * c - beta * r - settings["gamma"])) / 3
        elif case == "orpo":  # eq. 6 and 7
            odds = [math.exp(x) / (1 - math.exp(x)) for x in (c, r)]
            total += (-c + beta * -math.log(sigma(math.log(odds[0] / odds[1])))) / 3
        elif case == "sigmoid_norm":
            ratios = [sum(x) - ref_logps[2 * pair + j].item() for j, x in enumerate((chosen, rejected))]
            total += -math.log(sigma(beta * ratios[0] / len(chosen) - beta * ratios[1] / len(rejected))) / 3
        else:
            shared, alpha = min(len(chosen), len(rejected)), settings["ld_alpha"]
            ratios = [
                sum(x[:shared]) + alpha * sum(x[shared:]) - ref_logps[2 * pair + j].item()
                for j, x in enumerate((chosen, rejected))
            ]
            total += -math.log(sigma(beta * (ratios[0] - ratios[1]))) / 3
    out = pair_loss(tensors["hidden"], tensors["weight"], target, cu, ref_logps, beta=beta, **settings)
    assert out.loss.item() == pytest.approx(total, rel=1e-5)
    assert out.sft_loss.item() == pytest.approx(nll, rel=1e-5)


def test_reference_sums_of_ld_dpo_have_the_weights_of_the_loss():
    tensors, target, cu, _, _ = make((3, 7, 1, 4, 6, 2), {})
    logp = linear_logp(tensors["hidden"], tensors["weight"], target)
    ref = sequence_sums(logp, cu, ld_alpha=0.4)
    out = pair_loss(tensors["hidden"], tensors["weight"], target, cu, ref, ld_alpha=0.4)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6) and (out.chosen_rewards == 0).all()
    assert torch.equal(out.chosen_logps, sequence_sums(logp, cu)[0::2])
    with pytest.raises(ValueError, match="two responses of a pair"):
        sequence_sums(logp, cu[:-1], ld_alpha=0.4)


def test_losses_stay_finite_at_large_margins():
    far = torch.tensor([0.0, -1e4])
    scores = PairScores(far, far.flip(0), torch.ones(2), torch.ones(2))
    for case in LOSS_CASES.values():
        assert all(x.isfinite().all() for x in LOSSES[case["loss"]](scores, LossSettings(**case)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kto"}, "unknown loss 'kto'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "'ipo' has no label_smoothing"),
        ({"loss": "sigmoid_norm", "label_smoothing": 0.1}, "'sigmoid_norm' has no label_smoothing"),
        ({"gamma": 0.5}, "'sigmoid' has no gamma; it belongs to simpo"),
        ({"loss": "simpo", "ref_logps": None}, "'simpo' needs gamma"),
        ({"loss": "simpo", "gamma": 0.5}, "'simpo' has no reference, but ref_logps were given"),
        ({"loss": "orpo"}, "'orpo' has no reference"),
        ({"loss": "ipo", "ld_alpha": 0.5}, "'ipo' has no ld_alpha"),
        ({"ld_alpha": 1.5}, "ld_alpha must be in \\[0, 1\\]"),
        ({"sft_weight": -1.0}, "sft_weight"),
        ({"lora": (torch.zeros(2, 5), torch.zeros(19, 2), 1.0)}, "lora must be a \\[r, 6\\] and b \\[19, r\\]"),
        ({"lora": (torch.zeros(2, 6).double(), torch.zeros(19, 2), 1.0)}, "a and b must be torch.float32"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps must be float \\[2\\]"),
        ({"cu_rows": torch.tensor([0, 2, 5])}, "int32"),
        ({"cu_rows": torch.tensor([0, 5], dtype=torch.int32)}, "2B \\+ 1 entries"),
        ({"cu_rows": torch.tensor([0, 5, 5], dtype=torch.int32)}, "grow strictly"),
        ({"cu_rows": torch.tensor([0, 2, 4], dtype=torch.int32)}, "grow strictly from 0 to N = 5"),
    ],
)
def test_bad_input_is_named(change, message):
    tensors, target, cu, ref_logps, _ = make((2, 3), {})
    inputs = {**tensors, "target": target, "cu_rows": cu, "ref_logps": ref_logps}
    with pytest.raises(ValueError, match=message):
        pair_loss(**(inputs | change))


# --- TRL's own trainer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_parts(tmp_path_factory):
    """A tiny Llama with another one as reference, and the batch that TRL's collator makes of four pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*"abcdefghijklmnopqrstuvwxyz", "<pad>", "<eos>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=26, eos_token_id=27, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, ref = (LlamaForCausalLM(config).float().eval() for _ in range(2))
    for model in (policy, ref):  # larger weights: log-probs and margins that are not all alike
        for parameter in model.parameters():
            parameter.data *= 4
    rows = [
        {"prompt": "a b c", "chosen": " d e f g", "rejected": " h"},
        {"prompt": "q", "chosen": " r", "rejected": " s t u v w x y z a"},
        {"prompt": "k l m n o", "chosen": " p q r", "rejected": " p q z"},
        {"prompt": "z z", "chosen": " i j k l m n", "rejected": " o p"},
    ]
    return policy, ref, tokenizer, rows, tmp_path_factory.mktemp("trl")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss", "smoothing", "beta", "ld_alpha"),
    [
        ("sigmoid", 0.0, 0.1, None),
        ("sigmoid", 0.0, 0.1, 0.3),
        ("sigmoid_norm", 0.0, 2.0, None),
        ("ipo", 0.0, 0.1, None),
        ("hinge", 0.0, 0.1, None),
        ("robust", 0.1, 0.3, None),
    ],
)
def test_loss_and_gradients_equal_trl(trl_parts, backend, loss, smoothing, beta, ld_alpha):
    """The loss that TRL 1.16's DPOTrainer computes on a padded batch, and its gradient of every parameter."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    policy, ref, tokenizer, rows, out_dir = trl_parts
    args = DPOConfig(
        output_dir=str(out_dir), beta=beta, loss_type=[loss], label_smoothing=smoothing, per_device_train_batch_size=4,
        ld_alpha=ld_alpha,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_dropout=True, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        policy, ref_model=ref, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    policy.zero_grad()
    expected = trainer.compute_loss(policy, dict(batch))
    expected.backward()
    expected_grads = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()

    # TRL's batch is [chosen..., rejected...]; ours is c0, r0, c1, r1, ... of the rows that predict a response token.
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    mask = batch["completion_mask"][order, 1:].bool()
    target = batch["input_ids"][order, 1:][mask]
    cu = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)

    def hidden(model):
        states = model.model(batch["input_ids"][order], attention_mask=batch["attention_mask"][order])
        return states.last_hidden_state[:, :-1][mask]

    with torch.no_grad():
        logp = linear_logp(hidden(ref), ref.lm_head.weight, target, backend=backend)
        ref_logps = sequence_sums(logp, cu, ld_alpha=ld_alpha)
    ours = pair_loss(
        hidden(policy), policy.lm_head.weight, target, cu, ref_logps,
        loss=loss, beta=beta, label_smoothing=smoothing, ld_alpha=ld_alpha, backend=backend,
    )  # fmt: skip
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    ours.loss.backward()
    for name, parameter in policy.named_parameters():
        error = (parameter.grad - expected_grads[name]).norm() / expected_grads[name].norm().clamp(min=1e-3)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", ["simpo", "orpo"])
def test_loss_and_gradients_equal_trl_without_reference(case):
    """TRL 1.16's own loss functions of log-probs per token: CPOTrainer's SimPO and ORPOTrainer's odds ratio."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    settings = LOSS_CASES[case]
    tensors, target, cu, _, _ = make((3, 7, 1, 4, 6, 2), {})
    hidden = tensors["hidden"].requires_grad_()
    logits = hidden @ tensors["weight"].T
    means = [
        # TRL shifts by one: a row of logits before each label, and a first label that nothing predicts.
        CPOTrainer.get_batch_logps(
            torch.cat([logits[a:b], logits[:1]])[None],
            torch.cat([target[:1], target[a:b]])[None],
            average_log_prob=True,
        )
        for a, b in pairwise(cu)
    ]
    trainer = SimpleNamespace(
        loss_type="simpo", alpha=0.0, beta=0.7, simpo_gamma=settings.get("gamma"), label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    pair = torch.cat(means[0::2]), torch.cat(means[1::2])
    if case == "simpo":
        expected, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *pair)
        expected = expected.mean()
    else:
        gain, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *pair)
        expected = -gain.mean() - pair[0].mean()  # its NLL, of the responses and a mean a pair, as ours
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    out = pair_loss(hidden, tensors["weight"], target, cu, beta=0.7, **settings)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(out.chosen_rewards, chosen_rewards, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rejected_rewards, rejected_rewards, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert (grad - expected_grad).norm() / expected_grad.norm() < 1e-5


def test_sft_is_the_nll_per_token():
    assert torch.equal(sft(torch.tensor([-6.0, -1.0]), torch.tensor([3.0, 2.0])), torch.tensor([2.0, 0.5]))
