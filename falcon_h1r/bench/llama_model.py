"""llama.cpp in `bench generate`: one file of the weights, and the faster of its two attentions.

Without flash attention its keys and values are float32 beside a float32 model, otherwise float16,
its default. Both ways pass the gate before they are tried.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cost as sheet
from ..cache import Cache
from ..checkpoint import CheckpointError, save_gguf
from ..model import FalconH1ForCausalLM
from . import gate
from .llama_library import library, why_not
from .llama_peer import LlamaPeer
from .registry import Workload
from .timing import MOST_CALLS, WallClock

# A query, key, value and sum of a layer are each rounded to float16 where keys and values are.
FLOAT16_ROUNDINGS = 4
ROOM = 2 * MOST_CALLS  # positions behind a workload's own: steps of a sample
TRIAL_TOKENS, TRIAL_CALLS = 256, 2


class Setting(NamedTuple):
    """One way to run llama.cpp."""

    flash_attention: bool
    kv_dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.kv_dtype).removeprefix("torch.")
        return f"flash attention {'on' if self.flash_attention else 'off'}, {kind} keys and values"


def llama_model(model: FalconH1ForCausalLM) -> LlamaModel | str:
    """The peer with our parameters; or, as a string, why there is none."""
    if reason := why_not():
        return reason
    if model.device.type != "cpu":
        return f"runs on the CPU here, the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"serves float32 and bfloat16 here, the model is {model.dtype}"
    try:
        return LlamaModel(model)
    except CheckpointError as error:
        return str(error)


def refuses(workload: Workload) -> str:
    """Why a workload is not run, or ""."""
    one_prompt = workload.phase == "prefill" and workload.batch == 1
    if one_prompt or (workload.phase == "decode" and workload.past):
        return ""
    return "is run here with one prompt from its start, or steps behind some tokens"


class LlamaModel:
    """`model` in a GGUF file of its own dtype, removed when this object is."""

    def __init__(self, model: FalconH1ForCausalLM):
        self._model, self._folder = model, tempfile.TemporaryDirectory()
        self._file = os.path.join(self._folder.name, "model.gguf")
        save_gguf(model, self._file, dtype=model.dtype)
        plain = torch.float32 if model.dtype == torch.float32 else torch.float16
        self._settings = [Setting(False, plain), Setting(True, torch.float16)]

    def judge(
        self, ids: Tensor, judged: Callable[[Tensor, float], gate.GateResult]
    ) -> gate.GateResult:
        """The gate: each row read as a prefill of all but one token and a step of one.

        judged(logits, extra): the verdict, with `extra` relative error per layer allowed for
        float16 keys and values. A setting that is refused is not tried later; if both are, the
        verdict is the last one's.
        """
        passed, verdicts = [], []
        for setting in self._settings:
            peer = self._open(setting, ids.shape[1], 1)
            try:
                rows = []
                for row in ids.tolist():
                    peer.read(row[:-1])
                    rows.append(torch.from_numpy(peer.step(row[-1:], len(row) - 1)[0]))
            finally:
                peer.close()
            narrow = setting.kv_dtype == torch.float16
            extra = FLOAT16_ROUNDINGS * gate.ROUNDOFF[torch.float16] if narrow else 0.0
            verdicts.append(judged(torch.stack(rows), extra))
            if verdicts[-1].passed:
                passed.append(setting)
        self._settings = passed
        return next((v for v in verdicts if v.passed), verdicts[-1])

    def bind(self, workload: Workload, ids: Tensor, cache: Cache) -> _Call:
        """The faster setting's call, after a short trial of each: some steps, or a short prompt."""
        trials = {}
        for setting in self._settings:
            call = self._call(setting, workload, ids, cache)
            try:
                trials[setting] = call.trial()
            finally:
                call.close()
        best = min(trials, key=trials.get)
        call = self._call(best, workload, ids, cache)
        call.settings = f"{library().source}, {best}"
        return call

    def extra_bytes(self, workload: Workload) -> int:
        """The file, which is mapped, keys and values, and one row's state on its way."""
        w, c = workload, self._model.config
        kept = sheet.kv_bytes(c, w.past + w.length + ROOM, self._settings[0].kv_dtype)
        kept += sum(sheet.state_bytes(c, torch.float32).values())
        return os.path.getsize(self._file) + (w.batch + 2) * kept

    def _call(self, setting: Setting, workload: Workload, ids: Tensor, cache: Cache) -> _Call:
        w = workload
        peer = self._open(setting, w.past + w.length + ROOM, w.batch)
        try:
            return (_Steps if w.phase == "decode" else _Prefill)(peer, w, ids, cache)
        except BaseException:
            peer.close()
            raise

    def _open(self, setting: Setting, length: int, rows: int) -> LlamaPeer:
        options = {"max_length": length, "max_sequences": rows, "file": self._file}
        return LlamaPeer(self._model, dtype=self._model.dtype, **setting._asdict(), **options)


class _Call:
    """What is timed."""

    settings = ""

    def __init__(self, peer: LlamaPeer, workload: Workload, ids: Tensor, cache: Cache):
        self.peer, self.ids, self.close = peer, ids, peer.close

    def trial(self) -> float:
        """Seconds of the fastest of some calls."""
        clock = WallClock(torch.device("cpu"))
        return min(self.sample(clock) for _ in range(TRIAL_CALLS))


class _Prefill(_Call):
    """The prompt, into an empty memory."""

    def __call__(self):
        self.peer.read(self.ids[0].tolist())

    def sample(self, clock) -> float:
        prompt = self.ids[0, :TRIAL_TOKENS].tolist()
        return clock.sample(lambda: self.peer.read(prompt))[0]


class _Steps(_Call):
    """A token for every row, behind the keys, values and states of `cache`.

    Its depth grows by one a call until `prepare` sets it back.
    """

    def __init__(self, peer: LlamaPeer, workload: Workload, ids: Tensor, cache: Cache):
        super().__init__(peer, workload, ids, cache)
        self.past = self.position = workload.past
        self.tokens = ids[:, -1].tolist()
        peer.stand(cache, self.past)

    def prepare(self) -> None:
        self.peer.set_back(self.past)
        self.position = self.past

    def __call__(self):
        self.tokens = self.peer.step(self.tokens, self.position).argmax(-1).tolist()
        self.position += 1

    def sample(self, clock) -> float:
        self.prepare()
        return clock.sample(self)[0]
