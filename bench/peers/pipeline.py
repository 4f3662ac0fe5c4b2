"""One iteration as people write it today, in a process of its own: `python -m bench.peers.pipeline JOB.json OUT.json`.

`generate` over static batches of prompts sorted by length, a padded forward over prompt + response for the scores,
TRL's DPOTrainer for both roles. It gets the token ids, the pairs and the trained student of a finished run of ours, so
every part has the same work and its result can be compared. Times leave out loading, tokenising, selecting and saving;
ours count all of that.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bench.harness.device import synchronise
from bench.inputs.pairs import PairData
from bench.peers.trainers import Setup, Work, best
from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.records import Pair, Prompt, Response, ids_digest, read_records
from macpo.engine.files import atomic_write
from macpo.engine.run.folder import folder_of
from macpo.method.encoding import encoded, limited_prompt, pair_responses
from macpo.method.policies import chat_of
from macpo.method.positives import read_candidates
from macpo.method.responses import read_responses
from macpo.method.run_plan import Builder, Plan
from macpo.recipe_kinds import AnyRecipe, load

PARTS = ("teachers' responses", "scoring", "student's training", "student's responses", "teachers' training")


@dataclass(frozen=True)
class Job:
    """What the process is asked: `options` are the batch sizes that each part tries."""

    run: str
    dtype: str
    device: str
    threads: int
    options: dict[str, list[int]]


class Pipeline:
    """The parts of one iteration over the files of a finished run."""

    def __init__(self, job: Job) -> None:
        self.run, self.device, self.dtype = Path(job.run), torch.device(job.device), getattr(torch, job.dtype)
        self.recipe: AnyRecipe = load(self.run)
        self.agents = {agent.name: Builder(self.recipe, Plan()).stage_agent(agent) for agent in self.recipe.agents}
        (self.student,) = (name for name in self.agents if name == "student")
        self.teachers = [name for name in self.agents if name != self.student]
        self.prompts = read_records(folder_of(self.run, "data") / "student.jsonl", Prompt)
        self.chats = {name: chat_of(agent, str(agent.model)) for name, agent in self.agents.items()}

    def part(self, name: str, option: int) -> tuple[float, dict[str, float]]:
        """Seconds of a part by one batch size, and how its result compares with ours."""
        if name == "teachers' responses":
            found = [self.responses(who, self.model_of(who), f"init-{who}-answer", option) for who in self.teachers]
            return sum(s for s, _ in found), {"equal_share": min(share for _, share in found)}
        if name == "student's responses":
            trained = str(folder_of(self.run, "iter1-student-train") / "policy")
            seconds, share = self.responses(self.student, trained, "iter1-student-answer", option)
            return seconds, {"equal_share": share}
        if name == "scoring":
            return self.scores(option)
        learners = [self.student] if name == "student's training" else self.teachers
        trained_by = [self.train(who, option) for who in learners]
        return sum(s for s, _ in trained_by), {"loss_error": max(error for _, error in trained_by)}

    def model_of(self, who: str) -> str:
        return str(self.agents[who].model)

    def responses(self, who: str, folder: str, stage: str, batch: int) -> tuple[float, float]:
        """Seconds, and the share of responses whose token ids are ours."""
        agent, chat = self.agents[who], self.chats[who]
        asked = {p.id: ids for p in self.prompts if (ids := limited_prompt(chat, agent, p)) is not None}
        model, limit = self._load(folder), self.recipe.sampling.max_new_tokens  # type: ignore[union-attr]
        start = time.perf_counter()
        found = generated(model, asked, batch, limit, sorted(chat.stop_ids))
        synchronise(self.device)
        seconds = time.perf_counter() - start
        ours = read_responses(folder_of(self.run, stage))
        return seconds, sum(_same(found[key], ours.get(key), chat) for key in found) / len(found)

    def scores(self, batch: int) -> tuple[float, dict[str, float]]:
        """Seconds to score all candidates; the largest difference of a log-prob relative to its size; whether every
        kept candidate is ours."""
        agent, chat = self.agents[self.student], self.chats[self.student]
        ours = read_candidates(folder_of(self.run, "iter1-student-score"))
        prompts = {prompt.id: prompt for prompt in self.prompts}
        groups = {
            key: encoded(chat, agent, prompts[key], [(each.text, each.finished) for each in candidates])
            for key, candidates in ours.items()
        }
        kept = {key: group for key, group in groups.items() if group is not None}
        model = self._load(self.model_of(self.student))
        start = time.perf_counter()
        found = padded_logps(model, list(kept.values()), batch)
        synchronise(self.device)
        seconds = time.perf_counter() - start
        errors, same = [], []
        for (key, group), logps in zip(kept.items(), found, strict=True):
            errors += [abs(a - b.sum_logp) / max(1.0, abs(b.sum_logp)) for a, b in zip(logps, ours[key], strict=True)]
            means = [logp / len(ids) for logp, ids in zip(logps, group.responses, strict=True)]
            perplexities = [each.perplexity for each in ours[key]]
            same.append(means.index(max(means)) == perplexities.index(min(perplexities)))
        return seconds, {"logp_error": max(errors), "equal_share": sum(same) / len(same)}

    def train(self, who: str, micro: int) -> tuple[float, float]:
        """Seconds of the reference pass and all steps, and how far the first loss is from ours."""
        agent, chat = self.agents[who], self.chats[who]
        stage = f"iter1-{who}-{'select' if who == self.student else 'pairs'}"
        pairs = read_records(folder_of(self.run, stage) / "pairs.jsonl", Pair)
        read = [encoded(chat, agent, pair.prompt, pair_responses(pair)) for pair in pairs]
        groups = [group for group in read if group is not None and group.responses[0] != group.responses[1]]
        training = self.recipe.student_training if who == self.student else self.recipe.teacher_training  # type: ignore[union-attr]
        step = training.preference.batch
        order = sorted(range(len(groups)), key=lambda i: groups[i].max_length)[: len(groups) // step * step]
        folder = self.model_of(who)
        tuning: Literal["full", "lora"] = (
            "full" if next(a for a in self.recipe.agents if a.name == who).tuning.type == "full" else "lora"
        )
        data = PairData("the run's pairs", [], groups, chat.tokenizer)
        config = AutoModelForCausalLM.from_pretrained(folder).config
        setup = Setup(config, tuning, self.dtype, self.device, step, data, weights=folder)
        outcome = best(micro).run(setup, Work(order, order))
        metrics = folder_of(self.run, f"iter1-{who}-train") / "metrics.jsonl"
        first = json.loads(metrics.read_text().splitlines()[0])["loss"]
        return outcome.seconds * len(groups) / len(order), abs(outcome.losses[0] - first)

    def _load(self, folder: str) -> PreTrainedModel:
        gc.collect()
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device).eval()
        return model


def _same(ids: list[int], ours: Response | None, chat: Chat) -> bool:
    if ours is None:
        return not chat.text(ids).strip()
    return ours.ids_digest == ids_digest(ids) or ours.text == chat.text([i for i in ids if i not in chat.stop_ids])


@torch.no_grad()
def generated(
    model: PreTrainedModel, asked: dict[str, list[int]], batch: int, max_new_tokens: int, stops: Sequence[int]
) -> dict[str, list[int]]:
    """Greedy responses with the token that ended them, from static batches of prompts sorted by length."""
    found: dict[str, list[int]] = {}
    order = sorted(asked, key=lambda key: len(asked[key]))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stops) or None, pad_token_id=0
    )
    for start in range(0, len(order), batch):
        keys = order[start : start + batch]
        longest = max(len(asked[key]) for key in keys)
        ids = torch.tensor([[0] * (longest - len(asked[key])) + asked[key] for key in keys])
        mask = torch.tensor([[0] * (longest - len(asked[key])) + [1] * len(asked[key]) for key in keys])
        run: Callable[..., Any] = model.generate
        out = run(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
        for key, row in zip(keys, out[:, longest:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            found[key] = row[:end]
    return found


@torch.no_grad()
def padded_logps(model: PreTrainedModel, groups: Sequence[PrefixGroup], batch: int) -> list[list[float]]:
    """Summed log-probs of every response: padded forwards over prompt + response, sorted by length."""
    flat = [(n, k, group.prompt_ids, ids) for n, group in enumerate(groups) for k, ids in enumerate(group.responses)]
    flat.sort(key=lambda each: len(each[2]) + len(each[3]))
    found = [[0.0] * len(group.responses) for group in groups]
    for start in range(0, len(flat), batch):
        rows = flat[start : start + batch]
        longest, kept = max(len(p) + len(r) for *_, p, r in rows), max(len(r) for *_, r in rows) + 1
        ids = torch.tensor([[0] * (longest - len(p) - len(r)) + p + r for *_, p, r in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(p) - len(r)) + [1] * (len(p) + len(r)) for *_, p, r in rows], device=model.device
        )
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=kept
        ).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, -kept + 1 :, None])[..., 0]
        for (n, k, _, response), row in zip(rows, logps, strict=True):
            found[n][k] = float(row[-len(response) :].sum())
    return found


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(job.threads)
    pipeline = Pipeline(job)
    parts: dict[str, dict[str, Any]] = {}
    for name, options in job.options.items():
        tried = {str(option): pipeline.part(name, option) for option in options}
        parts[name] = {
            "seconds": {option: seconds for option, (seconds, _) in tried.items()},
            "checks": {option: checks for option, (_, checks) in tried.items()},
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cuda = torch.cuda.max_memory_allocated() if job.device.startswith("cuda") else None
    atomic_write(Path(sys.argv[2]), json.dumps({"parts": parts, "peak_bytes": peak, "cuda_peak_bytes": cuda}))


if __name__ == "__main__":
    main()
