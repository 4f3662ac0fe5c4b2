"""What a recipe may say about models, training, sampling and compute; closed (an unknown key is an error)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from macpo.engine.connection import url_problem
from macpo.engine.paths import HubPath, LocalPath, absolute, relative_to

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
"""What can also be a part of a file's name."""


class Settings(BaseModel):
    """Base of every block of a recipe."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )


Quantization = Literal["none", "nf4"]


class LoraSettings(Settings):
    """Low-rank adapters in peft's layout."""

    type: Literal["lora"] = "lora"
    """Low-rank adapters."""
    rank: PositiveInt = 8
    """Rank r of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale of the update is alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")
    """Names of the linear modules that get an adapter."""
    quantization: Quantization = "none"
    """`nf4`: the frozen base in 4 bits (bitsandbytes), as QLoRA, arXiv 2305.14314."""


class FullSettings(Settings):
    """Every weight is trained."""

    type: Literal["full"] = "full"
    """All weights."""


Tuning = Annotated[LoraSettings | FullSettings, Field(discriminator="type")]


AUTO_MICROBATCH = {"cpu": 1024, "cuda": 8192}
"""Tokens of a packed forward. On a CPU the step of 2,557 tokens of SmolLM2-135M takes 33 s with 512 to 8,192 of them
and 39 s with 256; a token's activations take 1.5 MB."""


def microbatch_tokens(tokens: int | Literal["auto"], device: str) -> int:
    """The token budget of a forward on a device, "cpu" or "cuda"."""
    return AUTO_MICROBATCH[device] if tokens == "auto" else tokens


class OptimSettings(Settings):
    """One training stage: AdamW, linear warm-up, then cosine or constant learning rate."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    batch: PositiveInt = 16
    """Sequences (SFT) or pairs (preference) that make one optimiser step, over all ranks."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine and linear end at zero."""
    warmup_fraction: Fraction = 0.0
    """Share of the steps with a linearly growing learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    microbatch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Token budget of one packed forward; changes memory and speed, not the loss. `auto` is 8,192 on a GPU and 1,024 on
    a CPU, which is as fast with more and needs memory for every token."""
    save_every_steps: PositiveInt = 200
    """A checkpoint inside the stage after so many optimiser steps."""
    spike_sigma: Annotated[float, Field(gt=0)] | None = 6.0
    """A loss so many standard deviations above its recent mean is a spike; none turns the guard off."""
    on_spike: Literal["warn", "stop"] = "warn"
    """`stop` saves before the step that spiked and ends the stage."""


LossName = Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo"]
# What kernels/pair_loss/losses.py says of them, which cannot be asked without torch; a test compares the two.
REFERENCE_FREE = frozenset({"simpo", "orpo"})
SMOOTHED = frozenset({"sigmoid", "robust"})
DESENSITISED = frozenset({"sigmoid", "robust", "hinge"})


class PreferenceSettings(OptimSettings):
    """Contrastive preference optimisation (DPO, arXiv 2305.18290) plus an SFT term on the chosen response.

    A setting that the loss has no use for is refused; formulas and sources are in kernels/pair_loss/losses.py.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    loss: LossName = "sigmoid"
    """`sigmoid` (DPO; with label_smoothing cDPO, with ld_alpha LD-DPO), `sigmoid_norm` (DPO by token), `robust` (rDPO),
    `ipo` (by token), `hinge` (SLiC), `simpo` and `orpo` (both without a reference)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference policy; IPO's tau, ORPO's lambda. SimPO's paper has 2 to 2.5."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed rate of swapped pairs; for sigmoid and robust."""
    gamma: Annotated[float, Field(ge=0)] | None = None
    """Target margin of simpo, in units of the reward; simpo needs it."""
    ld_alpha: Fraction | None = None
    """Weight of the tokens beyond the shorter response's length (LD-DPO); for sigmoid, robust and hinge."""
    sft_weight: Annotated[float, Field(ge=0)] = Field(default_factory=lambda data: sft_weight_default(data, 0.2))
    """Weight of the mean token NLL of the chosen response (LLaMA-Factory's `dpo_ftx`); default 0.2, for orpo 1."""
    reference: Literal["policy", "adapter-off"] = "policy"
    """What the policy is held to: `policy`, itself as it is before the first step; `adapter-off`, its base model
    without the adapter that training goes on with."""
    reference_model: HubPath | None = None
    """Instead of `reference`: another model's folder or Hub id, with the policy's own tokenizer."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.loss not in REFERENCE_FREE

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> PreferenceSettings:
        with_reference = frozenset(get_args(LossName)) - REFERENCE_FREE
        for name, is_set, losses in (
            ("label_smoothing", self.label_smoothing > 0, SMOOTHED),
            ("gamma", self.gamma is not None, {"simpo"}),
            ("ld_alpha", self.ld_alpha is not None, DESENSITISED),
            ("reference", self.reference != "policy", with_reference),
            ("reference_model", self.reference_model is not None, with_reference),
        ):
            if is_set and self.loss not in losses:
                raise ValueError(f"{name} belongs to {', '.join(sorted(losses))}; the loss {self.loss!r} ignores it")
        if self.loss == "simpo" and self.gamma is None:
            raise ValueError("gamma is missing: simpo needs its target margin Fix: add gamma, such as 0.5")
        if self.reference_model is not None and self.reference != "policy":
            raise ValueError("reference_model is a reference of its own: leave `reference` out")
        return self


class RewardSettings(OptimSettings):
    """Bradley-Terry training of a reward model on pairs (arXiv 2203.02155, equation 1)."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate; 1e-4 suits an adapter, 1e-5 all weights."""
    batch: PositiveInt = 64
    """Pairs that make one optimiser step, over all ranks."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps with a linearly growing learning rate."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.01
    """Weight of (chosen + rejected reward) squared, which keeps rewards around zero (arXiv 2312.09244, equation 2)."""


def sft_weight_default(data: Mapping[str, Any], default: float) -> float:
    """ORPO is a sum with the NLL (arXiv 2403.07691, eq. 6)."""
    return 1.0 if data.get("loss") == "orpo" else default


class SamplingSettings(Settings):
    """How responses are drawn; filters apply in Hugging Face's order: temperature, top-k, top-p, min-p."""

    temperature: Annotated[float, Field(ge=0)] = 0.95
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest set of tokens whose probability reaches this."""
    top_k: Annotated[int, Field(ge=0)] = 50
    """Only the k most likely tokens; 0 turns it off."""
    min_p: Fraction = 0.0
    """Only tokens at least this fraction as likely as the best one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides (multiplies, where negative) the logits of tokens that were already seen."""
    max_new_tokens: PositiveInt = 512
    """Longest response."""


class ServedSettings(Settings):
    """A server that holds an agent's weights and generates for it (engine/generation/served.py)."""

    base_url: str
    """Such as http://127.0.0.1:8000/v1."""
    server: Literal["vllm", "sglang", "transformers", "openai"]
    """What answers there, which decides how prompts and sampling are said to it. `transformers` is `transformers
    serve`; `openai` any other server, which gets no more than OpenAI's own options."""
    api: Literal["completions", "chat"] = "completions"
    """`completions`: the very tokens that the agent's template makes; `chat`: the dialogue, under the server's own."""
    api_key_env: str | None = None
    """Name of an environment variable with the key; none for servers without one."""
    concurrency: PositiveInt = 16
    """Requests under way at once, of each process."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for one response."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often a request is sent again after a time-out, a lost connection, 408, 409, 429 or 5xx."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> ServedSettings:
        if problem := url_problem(self.base_url, self.api_key_env):
            raise ValueError(f"base_url {problem[0]} Fix: {problem[1]}")
        return self


class PretrainSettings(OptimSettings):
    """Plain language modelling on documents, for models trained from scratch."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak learning rate."""
    max_documents: PositiveInt | None = None
    """Use only the first documents of the corpus."""


def _corpus(text: str, info: ValidationInfo) -> str:
    return text if text == "data" else absolute(text, relative_to(info))


Corpus = Annotated[str, AfterValidator(_corpus)]
"""`data`, or the path of a text file, which becomes absolute."""


class InitSettings(Settings):
    """A small Llama built, given a tokenizer and pretrained here, so that everything works offline."""

    hidden_size: PositiveInt = 128
    """Width of the model."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads; hidden_size is this times an even head size."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, a divisor of num_heads; defaults to num_heads."""
    intermediate_size: PositiveInt | None = None
    """Width of the MLP; defaults to 8/3 of hidden_size, rounded up to a multiple of 8."""
    context: PositiveInt = 512
    """Longest sequence in tokens."""
    tokenizer: Literal["word", "bpe"] = "bpe"
    """`word`: one token a blank-separated word; `bpe`: byte-level byte-pair encoding."""
    vocab_size: PositiveInt = 2048
    """Upper bound on the size of the trained vocabulary."""
    initializer_range: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the random matrices; default 1 / sqrt(hidden_size)."""
    corpus: Corpus = "data"
    """`data` (documents that the dataset sets aside for pretraining) or the path of a text file, a document a line."""
    learn: Literal["all", "answers"] = "all"
    """Tokens of a dialogue that pretraining predicts: `all`, or only the `responses`; plain text always whole."""
    pretrain: PretrainSettings = PretrainSettings()

    @model_validator(mode="after")
    def _heads_divide(self) -> InitSettings:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError("hidden_size must be num_heads times an even head size")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        return self


class ParallelSettings(Settings):
    """How one model is spread over the ranks, and what its training keeps in memory; nothing here changes the loss."""

    sharding: Literal["replicate", "shard", "hybrid"] = "replicate"
    """`replicate`: a whole model a rank; `shard`: FSDP2 over all ranks; `hybrid`: sharded in a node, replicated
    between nodes."""
    tensor: PositiveInt = 1
    """Ranks that split every layer between them (tensor parallelism)."""
    checkpointing: Literal["off", "selective", "full"] = "off"
    """Activations computed again in the backward: none, all but the products, or whole blocks."""
    offload_activations: bool = False
    """Activations wait for the backward in host memory."""
    compile: bool = False
    """Compile every transformer block with torch.compile."""
    liger: Literal["auto", "off"] = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU kernels; `auto` uses them on GPUs where they are installed."""


class ComputeSettings(Settings):
    """Where and how the work is done; nothing here changes the method."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` is a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on GPUs and float32 on CPUs."""
    jobs: PositiveInt = 1
    """Stages that may run at once, each in a process of its own; under torchrun the ranks share each stage instead."""
    threads: PositiveInt | None = None
    """CPU threads of each process; part of what makes CPU results equal to the bit."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Base models kept loaded at once may take this much; default: 60% of the device's memory."""
    score_tokens: PositiveInt = 16384
    """Token budget of one packed scoring forward."""
    generation_batch: PositiveInt | Literal["auto"] = "auto"
    """Sequences decoded together; `auto` is 256, as with fewer a GPU's products wait for memory and a small model on a
    CPU for its operators; on a CPU as many as 1 GiB of keys and values hold, if more than 64. Where memory runs out,
    it is halved."""
    wave_requests: PositiveInt | Literal["auto"] = "auto"
    """Requests that generation commits to disk together, the unit of resume; `auto` is 2,048 on a GPU, so that its
    batch stays full, else 256."""
    parallel: ParallelSettings = ParallelSettings()
    cache: LocalPath | None = None
    """Folder for reference log-probs, which runs can share; default `cache` inside the run's folder."""
    trackers: tuple[str, ...] = ()
    """Where training metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio` (each is an extra), or
    `module:function` (engine/trackers.py)."""
