"""pair_loss: values and every gradient against float64, and against the published losses (TRL's own code)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import BACKENDS, assert_close

from macpo.kernels import linear_logp, pair_loss, sequence_sums
from macpo.kernels.pair_loss import reference
from macpo.kernels.pair_loss.losses import LOSSES, LossSettings, PairScores

# (loss, label_smoothing): every loss, and smoothing where it means something.
LOSS_CASES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.2)]
HEADS = {"plain": {}, "all": {"bias": True, "logit_scale": 1.5, "softcap": 3.0}}
# One pair of single tokens; ragged pairs, one of which has a single token.
LENGTHS = [(1, 1), (3, 7, 1, 4, 6, 2)]


def make(lengths, head, dtype=torch.float32, hidden_size=6, vocab=19):
    g = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    num_rows = int(cu[-1])
    tensors = {
        "hidden": torch.randn(num_rows, hidden_size, generator=g),
        "weight": torch.randn(vocab, hidden_size, generator=g),
    }
    if head.get("bias"):
        tensors["bias"] = torch.randn(vocab, generator=g)
    target = torch.randint(vocab, (num_rows,), generator=g)
    options = {k: v for k, v in head.items() if k != "bias"}
    logp = linear_logp(target=target, **tensors, **options)
    ratios = torch.tensor([-0.8, 0.5, 2.0, -1.0, -3.0, 1.5])  # of either sign; IPO's target, 1.7 at beta 0.3, is none
    ref_logps = sequence_sums(logp, cu) - ratios[: len(lengths)]
    return {name: x.to(dtype) for name, x in tensors.items()}, target, cu, ref_logps, options


def run(fn, tensors, *args, trained, **options):
    leaves = {name: x.clone().requires_grad_(name in trained) for name, x in tensors.items()}
    out = fn(leaves["hidden"], leaves["weight"], *args, bias=leaves.get("bias"), **options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    return loss.detach(), {name: leaves[name].grad for name in leaves if name in trained}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "smoothing"), LOSS_CASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sft_weight", [0.0, 0.2])
def test_values_and_gradients_equal_float64(backend, loss, smoothing, lengths, head, sft_weight):
    tensors, target, cu, ref_logps, options = make(lengths, HEADS[head])
    options |= {"loss": loss, "label_smoothing": smoothing, "sft_weight": sft_weight, "beta": 0.3}
    wide = {name: x.double() for name, x in tensors.items()}
    expected, expected_grads = run(reference.pair_loss, wide, target, cu, ref_logps, trained=tensors, **options)
    floor = 0.1  # a met hinge has no gradient; the log-ratios are such that no other loss is near its minimum
    for trained in (("hidden",), ("weight", "bias"), tuple(tensors)):
        for chunk_rows in (None, 4):
            chosen = {**options, "backend": backend, "chunk_rows": chunk_rows}
            value, grads = run(pair_loss, tensors, target, cu, ref_logps, trained=trained, **chosen)
            assert_close(value, expected, torch.float32, "loss", floor)
            for name, grad in grads.items():
                assert_close(grad, expected_grads[name], torch.float32, f"d{name}", floor)


def test_reference_free_tied_and_adapted_weights():
    tensors, target, cu, _, _ = make((3, 2, 4, 1), {})
    ids = torch.randint(19, target.shape, generator=torch.Generator().manual_seed(1))

    def tied(fn, dtype):
        table = tensors["weight"].to(dtype, copy=True).requires_grad_()
        a, b = (torch.randn(*s, generator=torch.Generator().manual_seed(2)).to(dtype) for s in ((19, 2), (2, 6)))
        a.requires_grad_()
        out = fn(torch.tanh(table[ids]), table + a @ b, target, cu, None, beta=0.2)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()
        return table.grad, a.grad

    for value, expected in zip(tied(pair_loss, torch.float32), tied(reference.pair_loss, torch.float64), strict=True):
        assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "smoothing"), LOSS_CASES)
def test_micro_batches_sum_to_the_big_batch(backend, loss, smoothing):
    lengths = (3, 7, 1, 4, 6, 2)
    tensors, target, cu, ref_logps, _ = make(lengths, {})
    options = {"loss": loss, "label_smoothing": smoothing, "sft_weight": 0.2, "backend": backend}
    whole, whole_grads = run(pair_loss, tensors, target, cu, ref_logps, trained=tensors, **options)
    total, grads = 0.0, {"hidden": [], "weight": []}
    for first in (0, 2, 4):
        rows = slice(int(cu[first]), int(cu[first + 2]))
        part = {"hidden": tensors["hidden"][rows], "weight": tensors["weight"]}
        args = (target[rows], cu[first : first + 3] - cu[first], ref_logps[first : first + 2])
        value, part_grads = run(pair_loss, part, *args, trained=part, num_pairs=3, **options)
        total = total + value
        for name, grad in part_grads.items():
            grads[name].append(grad)
    assert_close(total, whole, torch.float32)
    assert_close(torch.cat(grads["hidden"]), whole_grads["hidden"], torch.float32)
    assert_close(sum(grads["weight"]), whole_grads["weight"], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_of_dpo_gives_ln_2(backend):
    """Reference and policy through the same operator: the log-ratio is exactly 0, whatever the log-probs' size."""
    tensors, target, cu, _, _ = make((400, 300, 1, 200), {}, vocab=997)
    hidden = tensors["hidden"] * 4
    with torch.no_grad():
        ref = sequence_sums(linear_logp(hidden, tensors["weight"], target, backend=backend), cu)
    assert ref.abs().max() > 1000
    out = pair_loss(hidden.requires_grad_(), tensors["weight"], target, cu, ref, backend=backend)
    assert abs(out.loss.item() - math.log(2)) < 1e-6
    assert out.margin.item() == 0.0 and (out.chosen_rewards == 0).all()


def test_only_the_loss_carries_gradient_and_metrics_are_what_they_say():
    tensors, target, cu, ref_logps, _ = make((3, 7, 1, 4, 6, 2), {})
    out = pair_loss(
        tensors["hidden"].requires_grad_(), tensors["weight"], target, cu, ref_logps, beta=0.5, sft_weight=2.0
    )
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss"]
    logp = linear_logp(tensors["hidden"], tensors["weight"], target).detach()
    sums = sequence_sums(logp, cu)
    assert torch.equal(out.chosen_logps, sums[0::2]) and torch.equal(out.rejected_logps, sums[1::2])
    assert torch.equal(out.chosen_rewards, 0.5 * (sums - ref_logps)[0::2])
    assert torch.equal(out.rejected_rewards, 0.5 * (sums - ref_logps)[1::2])
    margin = out.chosen_rewards - out.rejected_rewards
    assert out.accuracy.item() == pytest.approx((margin > 0).float().mean().item())
    assert out.margin.item() == pytest.approx(margin.mean().item())
    chosen_means = [logp[cu[i] : cu[i + 1]].mean() for i in (0, 2, 4)]
    assert out.sft_loss.item() == pytest.approx(-sum(chosen_means).item() / 3, rel=1e-6)
    assert out.loss.item() == pytest.approx((-F.logsigmoid(margin).mean() + 2.0 * out.sft_loss).item(), rel=1e-6)


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


def test_losses_stay_finite_at_large_margins():
    far = torch.tensor([1e4, -1e4])
    scores = PairScores(far, -far, torch.ones(2), torch.ones(2))
    for name, smoothing in LOSS_CASES:
        assert all(x.isfinite().all() for x in LOSSES[name](scores, LossSettings(name, 0.1, smoothing)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kto"}, "unknown loss 'kto'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "'ipo' has no label_smoothing"),
        ({"sft_weight": -1.0}, "sft_weight"),
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
    ("loss", "smoothing", "beta"),
    [("sigmoid", 0.0, 0.1), ("ipo", 0.0, 0.1), ("hinge", 0.0, 0.1), ("robust", 0.1, 0.3)],
)
def test_loss_and_gradients_equal_trl(trl_parts, backend, loss, smoothing, beta):
    """The loss that TRL 1.16's DPOTrainer computes on a padded batch, and its gradient of every parameter."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    policy, ref, tokenizer, rows, out_dir = trl_parts
    args = DPOConfig(
        output_dir=str(out_dir), beta=beta, loss_type=[loss], label_smoothing=smoothing, per_device_train_batch_size=4,
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
        ref_logps = sequence_sums(linear_logp(hidden(ref), ref.lm_head.weight, target, backend=backend), cu)
    ours = pair_loss(
        hidden(policy), policy.lm_head.weight, target, cu, ref_logps,
        loss=loss, beta=beta, label_smoothing=smoothing, backend=backend,
    )  # fmt: skip
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    ours.loss.backward()
    for name, parameter in policy.named_parameters():
        error = (parameter.grad - expected_grads[name]).norm() / expected_grads[name].norm().clamp(min=1e-3)
        assert error < 1e-5, f"{name}: {error:.1e}"
