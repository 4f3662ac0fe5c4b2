"""Small models trained from scratch: a tokenizer, a Llama and pretraining documents (the recipe's `init:` block).

The engine's own trainer pretrains them with the `sft` objective; a document is a prefix group whose prompt is its first
token and whose one response is the rest.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from macpo.engine.config import InitSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Prompt, named
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.files import explained, read_jsonl
from macpo.engine.models.loading import quiet_transformers
from macpo.engine.models.saving import share_as_folder
from macpo.engine.opening import open_regular
from macpo.engine.unpacking import unpacked

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_MARKERS = ("<|im_start|>", "<|im_end|>")  # become tokens where the template writes them
_NUM_BYTES = 256


def train_tokenizer(
    documents: Sequence[Example | str], settings: InitSettings, template: str = "vicuna"
) -> PreTrainedTokenizerBase:
    """Train a tokenizer with <unk> <s> </s> as ids 0, 1, 2; it puts <s> before a text and knows the template's words.

    `word`: one token per blank-separated word, the most frequent ones (ties in alphabetical order); decoding joins
    words with blanks. `bpe`: byte-level byte-pair encoding, which round-trips any text.
    The result is a function of documents, settings and template alone, and carries the template for Hugging Face.
    Raises ConfigError for a vocabulary that is too small, DataError for documents without text.
    """
    frame, markers = _template_frame(template)
    specials = [UNK, BOS, EOS, *markers]
    if not any(text.strip() for text in _texts(documents)):
        raise DataError("no text to train a tokenizer on", "give documents with words", field="init.corpus")
    if settings.tokenizer == "word":
        backend = _word_level(documents, specials, frame, settings.vocab_size)
    else:
        backend = _byte_level(documents, specials, frame, settings.vocab_size)
    tokenizer = _wrap(backend, specials, settings.context)
    tokenizer.chat_template = Chat(tokenizer, template).hf_template
    return tokenizer


def llama_shape(settings: InitSettings, vocab_size: int | None = None) -> LlamaConfig:
    """The configuration of the small Llama; vocab_size defaults to the upper bound in the settings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size or settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size or -(-settings.hidden_size * 8 // 24) * 8,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads or settings.num_heads,
        max_position_embeddings=settings.context,
        initializer_range=settings.initializer_range or settings.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def build_model(settings: InitSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama with random float32 weights and tied embeddings, determined by settings, vocabulary size and seed."""
    from transformers import LlamaForCausalLM

    config = llama_shape(settings, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def document_groups(chat: Chat, documents: Iterable[Example], max_tokens: int, learn: str = "all") -> list[PrefixGroup]:
    """Documents as groups of at most max_tokens tokens: prompt = the first token, one response = the rest.

    An Example without messages is plain text, any other its rendered dialogue; EOS follows if it is finished.
    A longer document continues in further groups, each beginning with the last token of the one before, so that every
    token but a document's first is predicted exactly once. Documents of one token are left out.
    With learn = "answers" a dialogue becomes its prompt and one response, so that only the response is predicted.
    Raises ConfigError for max_tokens below 2, DataError for a dialogue that cannot be encoded, or if nothing is left.
    """
    if max_tokens < 2:
        raise ConfigError(f"got {max_tokens}", "allow at least 2 tokens", field="init.context")
    groups = []
    for document in documents:
        messages = document.prompt.messages
        try:
            if learn == "answers" and messages:
                group = chat.group(messages, [(document.reply, document.finished)], max_tokens=max_tokens)
                groups += [group] if group is not None else []
                continue
            ids = chat.document_ids(messages, document.reply, document.finished)
        except DataError as error:
            raise named(error, document.prompt) from None
        for start in range(0, len(ids) - 1, max_tokens - 1):
            groups.append(PrefixGroup(ids[start : start + 1], [ids[start + 1 : start + max_tokens]]))
    if not groups:
        raise DataError("no document has two tokens", "give a corpus with text", field="init.corpus")
    return groups


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    """Write the Hugging Face folder: config.json, model.safetensors, the tokenizer's files and its template."""
    with explained(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
        share_as_folder(out_dir)


def read_corpus(path: str | Path) -> list[Example]:
    """Read documents from .txt (one per line, blank lines skipped) or .jsonl with {"text"}; both also as .gz.

    Raises ConfigError for a missing path or another kind of file, DataError with file and line for bad content.
    """
    name = str(path)
    if not Path(path).is_file():
        raise ConfigError(f"no file {name!r}", "give a .txt or .jsonl file", field="init.corpus")
    if name.removesuffix(".gz").endswith(".jsonl"):
        texts = list(_jsonl_texts(name))
    elif name.removesuffix(".gz").endswith(".txt"):
        texts = [line for line in _read_text(name).split("\n") if line.strip()]
    else:
        raise ConfigError(f"cannot read {Path(path).name!r}", "give a .txt or .jsonl file", field="init.corpus")
    if not texts:
        raise DataError("the corpus has no document", "give a file with text", file=name)
    return [Example(Prompt.of(()), text.strip(), by="corpus") for text in texts]


def _jsonl_texts(name: str) -> Iterator[str]:
    for line, row in read_jsonl(name):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            problem = f"missing or empty (keys seen: {', '.join(row) or 'none'})"
            raise DataError(problem, 'write {"text": "…"} on every line', file=name, line=line, field="text")
        yield text


def _read_text(name: str) -> str:
    try:
        with explained(name), open_regular(name) as plain:
            raw = unpacked(plain).read()
        return raw.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"damaged gzip: {error}", "fetch or pack it again", file=name) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=name, line=line) from None


def _texts(documents: Sequence[Example | str]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, str):
            yield document
        else:
            yield from (message["content"] for message in document.prompt.messages)
            yield document.response


def _template_frame(template: str) -> tuple[str, list[str]]:
    """(text that the template writes around two rounds of dialogue, the markers in it that must be tokens)."""
    specials = [UNK, BOS, EOS, *_MARKERS]
    bare = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*specials, "a"])}, unk_token=UNK))
    dialogue: list[Message] = [{"role": role, "content": "\0"} for role in ("user", "assistant", "user")]
    text = Chat(_wrap(bare, specials, 512), template).rendered(dialogue, "\0").replace("\0", " ")
    markers = [marker for marker in _MARKERS if marker in text]
    for special in specials:
        text = text.replace(special, " ")
    return text, markers


def _word_level(documents: Sequence[Example | str], specials: list[str], frame: str, vocab_size: int) -> Tokenizer:
    own = list(dict.fromkeys([*specials, *frame.split()]))
    if vocab_size <= len(own):
        raise ConfigError(f"got {vocab_size}", f"a vocabulary above {len(own)} words", field="init.vocab_size")
    counts = Counter(word for text in _texts(documents) for word in text.split())
    ranked = sorted((word for word in counts if word not in own), key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([*own, *ranked][:vocab_size])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _byte_level(documents: Sequence[Example | str], specials: list[str], frame: str, vocab_size: int) -> Tokenizer:
    if vocab_size < _NUM_BYTES + len(specials):
        fix = f"at least {_NUM_BYTES + len(specials)}: every byte and {len(specials)} special tokens"
        raise ConfigError(f"got {vocab_size}", fix, field="init.vocab_size")
    backend = Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    frames = (frame for document in documents if isinstance(document, Example) and document.prompt.messages)
    backend.train_from_iterator((text for texts in (_texts(documents), frames) for text in texts), trainer)
    return backend


def _wrap(backend: Tokenizer, specials: list[str], context: int) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(specials)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, specials.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=specials[3:],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
