"""What a recipe says of an agent: its base model or ready policies, and how it is tuned."""

from __future__ import annotations

from pydantic import model_validator

from macpo.data_settings import TemplateArguments
from macpo.engine.config import InitSettings, LoraSettings, Name, PositiveInt, ServedSettings, Settings, Tuning
from macpo.engine.data.templates import Template
from macpo.engine.paths import HubPath, OptionalHubPath


class ServedAgent(ServedSettings):
    """A server that holds both policies of a teacher, which then only answers (docs/served.md)."""

    positive: str
    """Name under which the server has the positive policy. It stands for the weights: give others another name."""
    negative: str
    """Name under which the server has the negative policy."""


class AgentSettings(Settings):
    """One agent: a base model, or a ready pair of policies."""

    name: Name = ""
    """How the agent is called in folders and reports; teachers default to teacher0, teacher1, …"""
    model: OptionalHubPath | None = None
    """Base model: a folder or a Hub id with safetensors weights."""
    init: InitSettings | None = None
    """Instead of `model`: build a small Llama and pretrain it here."""
    positive: OptionalHubPath | None = None
    """A ready positive policy (Hugging Face or peft folder); no initial training then."""
    negative: OptionalHubPath | None = None
    """A ready negative policy."""
    train: bool = True
    """Whether the iterations train this agent."""
    tuning: Tuning = LoraSettings()
    """Low-rank adapters or all weights."""
    template: Template | None = None
    """Chat template of this agent; defaults to the recipe's."""
    template_arguments: TemplateArguments | None = None
    """What this agent's template reads besides the dialogue; defaults to the recipe's."""
    eos_token: str | None = None
    """End-of-response token for tokenizers that name none."""
    data: HubPath | None = None
    """A preference set of this teacher's own, instead of the shared teacher half; the data block's settings hold."""
    data_prompts: PositiveInt | None = None
    """How many prompts of `data` this teacher sees, drawn by the seed; default all."""
    served: ServedAgent | None = None
    """A teacher that a server answers for; needs `train: false`. `model` then gives the tokenizer, and a `positive`
    policy here too the held-out log-probs, which servers do not give."""

    @model_validator(mode="after")
    def _has_weights(self) -> AgentSettings:
        if self.data_prompts is not None and self.data is None:
            raise ValueError("data_prompts is for a teacher with `data` of its own Fix: use data.teacher_prompts")
        if self.served is not None:
            return self._responses_only(self.served)
        if self.model is not None and self.init is not None:
            raise ValueError("model and `init` are two base models Fix: keep one of them")
        if self.model is None and self.init is None and self.positive is None:
            what = "a folder or Hub id in `model`, an `init` block, or a ready `positive` policy"
            raise ValueError(f"model is missing: the agent has no weights Fix: give {what}")
        if self.positive is not None and self.init is not None:
            raise ValueError("init is not read: `positive` is a ready policy Fix: keep one of them")
        return self

    def _responses_only(self, served: ServedAgent) -> AgentSettings:
        if self.train:
            raise ValueError("train must be false: a served agent's weights do not learn here Fix: set train: false")
        for name in ("init", "negative", "data"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not read: a served agent only answers Fix: leave {name} out")
        if not self.has_tokenizer:
            if served.api == "completions":
                text = "model is missing: api: completions sends the tokens that the agent's template makes"
                raise ValueError(f"{text} Fix: name the served model's folder or Hub id, or use api: chat")
            for name in ("template", "template_arguments", "eos_token"):
                if getattr(self, name) not in (None, {}):
                    raise ValueError(
                        f"{name} is not read: under api: chat the server uses its own Fix: leave {name} out"
                    )
        return self

    @property
    def source(self) -> str:
        """Where the agent's model comes from, in words."""
        if self.served is not None:
            return f"{self.served.positive}, served by {self.served.server}"
        if self.init is not None:
            return f"trained from scratch, hidden size {self.init.hidden_size}"
        return str(self.model or self.positive)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the agent's tokenizer and template are known here; not so of some that are served."""
        return not (self.model is None and self.init is None and self.positive is None)

    @property
    def has_weights(self) -> bool:
        """Whether the agent's positive policy can be loaded or is trained from scratch."""
        return self.served is None or self.positive is not None
