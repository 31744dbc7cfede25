"""From a model to a checkpoint folder that transformers, vLLM and llama.cpp's converter read.

Tensors are written one at a time from where they are, so saving takes no memory beyond a copy of
the largest tensor, and that only where the model is not on the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from ..checks import check_integer
from ..files import whole_folder
from ..tensor_file import Spec, bytes_of, write_safetensors
from .errors import CheckpointError
from .generation_config import read_generation_config
from .hub import CHAT_TEMPLATES, CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, resolve
from .layout import (
    DTYPES,
    INDEX,
    SHARD_NAME,
    SINGLE,
    common_dtype,
    listed,
    read_json_object,
    refuse_adapters,
)

if TYPE_CHECKING:
    from ..model import FalconH1ForCausalLM


def save(
    model: FalconH1ForCausalLM,
    path: str | Path,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write `model` to the folder `path` in the released layout; parents are created.

    Weights keep their own dtype (A_log, D and dt_bias: float32 in a narrower model). They go into
    one model.safetensors, or, where they take more than `max_shard_bytes`, into numbered shards
    with an index; a shard exceeds the limit only where a single tensor does. Multipliers stay in
    config.json, separate from the weights.

    Tokenizer files and generation_config.json are copied from `tokenizer_from` (a local folder or
    hub repository id), else from `model.source`, the folder the model was loaded from, if it still
    exists. Where neither has them, no tokenizer is written and generation_config.json gets the
    token ids of the configuration.

    `path` must not exist, be an empty folder, or hold a Falcon-H1 checkpoint and nothing else,
    which is then replaced as a whole. The new folder is complete and on disk before the old one is
    touched, so both take disk space until then. A failure leaves nothing behind. What a killed
    process leaves beside `path` the next save removes. The swap is two renames: after a kill
    between them, loading from `path` or saving to it puts the new folder there first.

    Raises `CheckpointError` when `path` holds anything else, cannot be written, or when a tensor
    cannot be stored.
    """
    check_integer("max_shard_bytes", max_shard_bytes, 1, error=CheckpointError)
    refuse_adapters(model)
    tensors = model.state_dict()
    specs = [Spec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"cannot save tensor {name}: {tensor.dtype} on {tensor.device}, expected one of "
                f"{', '.join(DTYPES)} with data"
            )
    origins = _origins(model, tokenizer_from)
    target = Path(os.path.realpath(os.path.expanduser(path)))
    _refuse_foreign(target)
    try:
        with whole_folder(target) as folder:
            write_weights(folder, specs, tensors.__getitem__, max_shard_bytes)
            _write_json(folder / CONFIG, config_content(model.config, specs))
            _write_json(folder / GENERATION_CONFIG, _generation_config(model, origins))
            _copy_tokenizer(folder, origins)
    except OSError as error:
        raise CheckpointError(f"cannot save to {target}: {error}") from error


def write_weights(
    folder: Path,
    specs: list[Spec],
    tensor_of: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write the safetensors file or files of `specs`, and the index of the latter.

    tensor_of: gives the tensor of a name, called once for each, when it is about to be written; so
    a checkpoint can be larger than memory.
    """
    shards = _plan(specs, max_shard_bytes)
    if len(shards) == 1:
        _write_safetensors(folder / SINGLE, shards[0], tensor_of)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, shard, tensor_of)
        weight_map |= {spec.name: file for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def config_content(config: Any, specs: Iterable[Spec]) -> dict[str, Any]:
    """config.json: the configuration, and the dtype of the weights under both of its names."""
    dtype = common_dtype((spec.name, spec.dtype) for spec in specs)
    name = str(dtype).removeprefix("torch.")
    return config.to_dict() | {"dtype": name, "torch_dtype": name}


def _plan(specs: list[Spec], max_shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_safetensors(path: Path, specs: list[Spec], tensor_of: Callable[[str], Tensor]) -> None:
    def write(file: BinaryIO, spec: Spec) -> None:
        tensor = tensor_of(spec.name).detach().cpu().contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec
        file.write(bytes_of(tensor))

    # Readers of the Hugging Face family refuse a file without this entry.
    write_safetensors(path, specs, write, {"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _origins(model: FalconH1ForCausalLM, tokenizer_from: str | Path | None) -> list[Path]:
    """Folders to copy tokenizer and generation settings from, first choice first."""
    origins = []
    if tokenizer_from is not None:
        origins.append(resolve(tokenizer_from, weights=False))
        if not _tokenizer_files(origins[0]):
            raise CheckpointError(f"tokenizer_from: {origins[0]} holds no tokenizer files")
    if model.source is not None and model.source.is_dir():
        origins.append(model.source)
    return origins


def _tokenizer_files(folder: Path) -> list[Path]:
    named = sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    return [path for path in [*(folder / n for n in TOKENIZER_FILES), *named] if path.is_file()]


def _copy_tokenizer(folder: Path, origins: list[Path]) -> None:
    for origin in origins:
        if files := _tokenizer_files(origin):
            for file in files:
                copy = folder / file.relative_to(origin)
                copy.parent.mkdir(exist_ok=True)
                copy.write_bytes(file.read_bytes())
            return


def _generation_config(model: FalconH1ForCausalLM, origins: list[Path]) -> dict[str, Any]:
    for origin in origins:
        if content := read_generation_config(origin):
            return content
    config = model.config.to_dict()
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True, **ids}


def _refuse_foreign(target: Path) -> None:
    """Only what `save` could have written may be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder")
    names = sorted(os.listdir(target))
    if not names:
        return
    ours = {CONFIG, GENERATION_CONFIG, INDEX, SINGLE, *TOKENIZER_FILES}
    if all(path.suffix == ".jinja" for path in (target / CHAT_TEMPLATES).glob("*")):
        ours.add(CHAT_TEMPLATES)
    foreign = [name for name in names if name not in ours and not SHARD_NAME.fullmatch(name)]
    if foreign:
        raise CheckpointError(
            f"{target} is not replaced: it holds {listed(foreign)}, no part of a checkpoint"
        )
    if CONFIG not in names or not {INDEX, SINGLE} & set(names):
        raise CheckpointError(f"{target} is not replaced: it is neither empty nor a checkpoint")
    if (kind := read_json_object(target / CONFIG, True).get("model_type")) != "falcon_h1":
        raise CheckpointError(
            f"{target} is not replaced: its {CONFIG} has model_type {kind!r}, expected 'falcon_h1'"
        )
