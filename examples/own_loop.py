"""DPO in a plain torch loop: `macpo.pair_loss` takes hidden states and the head's weight, and never makes logits.

python examples/own_loop.py    # on the pairs of the small demo, which is run where it is not done
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import macpo
from macpo.kernels import linear_logp, sequence_sums

PAIRS_A_STEP = 16


def main() -> None:
    run = macpo.run(Path(__file__).with_name("small-demo.yaml"))
    (folder,) = run.folder.glob("*-init-student-positive/policy")  # the student before the first iteration
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    chat = macpo.load_policy(folder).chat  # tokenizer and template

    sequences: list[tuple[list[int], list[int]]] = []  # chosen, rejected, chosen, …: prompt and response
    pairs = run.pairs()
    for _, pair in pairs[pairs.agent == "student"].iterrows():
        prompt = chat.prompt_ids(pair.messages)
        for side in ("chosen", "rejected"):
            sequences.append((prompt, chat.reply_ids(pair.messages, pair[side], pair[f"{side}_finished"])))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(3):
        for start in range(0, len(sequences), 2 * PAIRS_A_STEP):
            input_ids, response_mask = padded(sequences[start : start + 2 * PAIRS_A_STEP])
            target = input_ids[response_mask]
            cu_rows = torch.tensor([0, *response_mask.sum(1).cumsum(0)], dtype=torch.int32)  # on the CPU
            with torch.no_grad():
                hidden = rows(reference, input_ids, response_mask)
                ref_logps = sequence_sums(linear_logp(hidden, reference.lm_head.weight, target), cu_rows)
            hidden = rows(model, input_ids, response_mask)
            out = macpo.pair_loss(hidden, model.lm_head.weight, target, cu_rows, ref_logps, beta=0.1)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        margin = (out.chosen_rewards - out.rejected_rewards).mean().item()
        print(f"epoch {epoch}: loss {out.loss.item():.4f}, reward margin {margin:.4f}")


def rows(model: PreTrainedModel, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """The hidden states that predict a response token: [N, H]."""
    hidden = model.base_model(input_ids).last_hidden_state  # right padding is behind all that causal attention sees
    return hidden[:, :-1][response_mask[:, 1:]]


def padded(sequences: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids and whether each is a response's: [2B, T] both."""
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    response_mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        response_mask[row, len(prompt) : end] = True
    return input_ids, response_mask


if __name__ == "__main__":
    main()
