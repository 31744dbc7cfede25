"""Loading time and peak memory: plain reading, our loader, transformers' from_pretrained.

    python benchmarks/bench_load.py                          # 7B-shaped, 15.2 GB in 4 shards
    python benchmarks/bench_load.py --preset tiny-90m --repeats 5 --cache warm

Writes a checkpoint of random bfloat16 weights, tensor by tensor, and measures each contestant in a
fresh process, in turns (A B C A B C); imports are not timed. Before any timing each loader must
give the bits of the file. Only Linux says what is measured here: /proc/self/status, posix_fadvise.

Columns. seconds: until the call returned. touched: until every page of every weight was read once,
so that a loader which maps the file and reads it later is not taken for a fast one. peak: the
resident set's high-water mark, interpreter and libraries included. anonymous, file: highest samples
of the parts of the resident set that are private memory, and pages of mapped files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("read", "falcon_h1r", "transformers")
GATE_TENSORS = 12
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="falcon-h1r-7b", help="shape of the model (default: %(default)s)")
    add("--dir", type=Path, help="where the checkpoint is written (default: the temporary folder)")
    add("--keep", action="store_true", help="leave the checkpoint there; a later run uses it again")
    add("--shards", type=int, default=4, help="number of files at most (default: %(default)s)")
    add("--repeats", type=int, default=3, help="runs of each contestant (default: %(default)s)")
    add(
        "--cache",
        choices=["dropped", "warm"],
        default="dropped",
        help="drop the files from the page cache before each run, or read them once (default: "
        "%(default)s)",
    )
    add("--worker", choices=[*CONTESTANTS, "gate"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args.dir, args.cache)))
        return 0
    if args.repeats < 1 or args.shards < 1:
        parser.error("--repeats and --shards must be positive")

    sys.path.insert(0, str(ROOT))
    folder = (args.dir or Path(tempfile.gettempdir())) / f"random-{args.preset}"
    print_machine_card(folder.parent)
    existed = folder.exists()
    try:
        if not existed:
            write_random_checkpoint(args.preset, folder, args.shards)
        return measure(args, folder)
    finally:
        if not args.keep and not existed:
            shutil.rmtree(folder, ignore_errors=True)


def measure(args: argparse.Namespace, folder: Path) -> int:
    gate = run_worker("gate", folder, "warm")
    print(f"correctness: {gate['tensors']} tensors bit-equal to the file in both loaders")
    runs: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for number in range(args.repeats):
        for name in CONTESTANTS:
            print(f"run {number + 1} of {args.repeats}: {name} ...", file=sys.stderr)
            runs[name].append(run_worker(name, folder, args.cache))

    medians = {
        name: {key: statistics.median(run[key] for run in done) for key in done[0]}
        for name, done in runs.items()
    }
    weights, read = medians["falcon_h1r"]["weight_bytes"], medians["read"]["seconds"]
    files = weight_files(folder)
    file_bytes = sum(file.stat().st_size for file in files)
    print(
        f"checkpoint: {args.preset}, random bfloat16, {file_bytes / 1e9:.2f} GB in {len(files)} "
        f"file(s); loaded weights {weights / 1e9:.2f} GB; page cache {args.cache} before each run; "
        f"median of {args.repeats} [min, max]\n"
    )
    print("| | seconds | x read | touched | GB/s | peak GB | peak / weights | anonymous | file |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, done in runs.items():
        m, seconds = medians[name], [run["seconds"] for run in done]
        cells = [
            f"{m['seconds']:.2f} [{min(seconds):.2f}, {max(seconds):.2f}]",
            f"{m['seconds'] / read:.2f}",
            f"{m['touched_seconds']:.2f}",
            f"{file_bytes / m['seconds'] / 1e9:.2f}",
            f"{m['peak_bytes'] / 1e9:.2f}",
            f"{m['peak_bytes'] / weights:.3f}" if m["weight_bytes"] else "",
            f"{m['anonymous_bytes'] / 1e9:.2f}",
            f"{m['file_bytes'] / 1e9:.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    summary = {
        "benchmark": "load",
        "preset": args.preset,
        "cache": args.cache,
        "repeats": args.repeats,
        "file_bytes": file_bytes,
        "files": len(files),
        "medians": medians,
        "runs": runs,
        "seconds_over_read": medians["falcon_h1r"]["seconds"] / read,
        "peak_over_weights": medians["falcon_h1r"]["peak_bytes"] / weights,
    }
    print(json.dumps(summary))
    return 0


def print_machine_card(folder: Path) -> None:
    def first(path: str, key: str) -> str:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
        return "?"

    while not folder.exists():
        folder = folder.parent
    lines = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{first('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "load average": f"{os.getloadavg()[0]:.2f} at the start",
        "memory": f"{first('/proc/meminfo', 'MemTotal')}, "
        f"available {first('/proc/meminfo', 'MemAvailable')}",
        "huge pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "disk": f"{shutil.disk_usage(folder).free / 1e9:.0f} GB free",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors")
        ),
    }
    for key, value in lines.items():
        print(f"{key}: {value}")


def write_random_checkpoint(preset: str, folder: Path, shards: int) -> None:
    """Of `preset`'s shapes, with never more than one tensor in memory."""
    import torch

    from falcon_h1r import FalconH1Config, FalconH1ForCausalLM
    from falcon_h1r.checkpoint.saver import Spec, config_content, write_weights
    from falcon_h1r.files import whole_folder

    config = FalconH1Config.preset(preset)
    model = FalconH1ForCausalLM(config, dtype=torch.bfloat16, device="meta")
    shapes = model.state_dict()
    specs = [Spec(name, tuple(t.shape), t.dtype) for name, t in shapes.items()]
    total, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total + 2**30:
        raise SystemExit(f"{folder.parent}: {free} bytes free, {total + 2**30} are needed")
    print(f"writing {total / 1e9:.2f} GB to {folder} ...", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)

    def random_tensor(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name].shape, dtype=shapes[name].dtype)
        return tensor.normal_(0, 0.02, generator=generator)

    # One tensor above the mean lets the greedy plan stay within the number of shards asked for.
    limit = total if shards == 1 else math.ceil(total / shards) + largest
    with whole_folder(folder) as new:
        write_weights(new, specs, random_tensor, limit)
        (new / "config.json").write_text(json.dumps(config_content(config, specs)))


def run_worker(name: str, folder: Path, cache: str) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--dir", str(folder), "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the run of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, folder: Path, cache: str) -> dict:
    """One measurement; runs in a process of its own."""
    sys.path.insert(0, str(ROOT))
    if name == "gate":
        return gate(folder)
    call = {"read": read_files, "falcon_h1r": ours, "transformers": theirs}[name](folder)
    files = weight_files(folder)
    if cache == "dropped":
        drop_from_page_cache(files)
    else:
        for file in files:
            read_file(file)
    before = memory()["VmRSS"]
    watch = MemoryWatch()
    watch.start()
    start = time.perf_counter()
    model = call()
    seconds = time.perf_counter() - start
    weight_bytes = 0
    if model is not None:
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        for parameter in model.parameters():
            touch(parameter)
    touched = time.perf_counter() - start
    peaks = watch.stop()
    return {
        "seconds": seconds,
        "touched_seconds": touched,
        "peak_bytes": memory()["VmHWM"],
        "before_bytes": before,
        "anonymous_bytes": peaks["RssAnon"],
        "file_bytes": peaks["RssFile"],
        "weight_bytes": weight_bytes,
    }


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_file(path: Path) -> None:
    """Into one buffer, over and over: what the disk or the page cache can deliver."""
    buffer = bytearray(4 * MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_files(folder: Path):
    def call() -> None:
        for file in weight_files(folder):
            read_file(file)

    return call


def ours(folder: Path):
    import torch

    from falcon_h1r import FalconH1ForCausalLM

    return lambda: FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def theirs(folder: Path):
    import torch
    from transformers import FalconH1ForCausalLM

    return lambda: FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def touch(parameter) -> None:
    import torch

    parameter.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def gate(folder: Path) -> dict:
    """Both loaders against the safetensors package: the bits of some tensors, A_log among them."""
    import torch
    from safetensors import safe_open

    names = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    ordered = sorted(names)
    step = math.ceil(len(ordered) / (GATE_TENSORS - 1))
    chosen = {*ordered[::step], next(name for name in ordered if name.endswith("A_log"))}
    for load in (ours, theirs):
        model = load(folder)()
        found = model.state_dict()
        for name in chosen:
            with safe_open(names[name], "pt") as opened:
                expected = opened.get_tensor(name).to(found[name].dtype)
            if not torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8)):
                raise SystemExit(f"{load.__name__}: {name} differs from {names[name]}")
        del model, found
    return {"tensors": len(chosen)}


def drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def memory() -> dict[str, int]:
    """Bytes from /proc/self/status."""
    out = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
            out[key] = int(value.split()[0]) * 1024
    return out


class MemoryWatch(threading.Thread):
    """The highest value of each memory figure, looked at every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peaks = memory()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self._take()

    def stop(self) -> dict[str, int]:
        self.done.set()
        self.join()
        self._take()
        return self.peaks

    def _take(self) -> None:
        self.peaks = {key: max(value, self.peaks[key]) for key, value in memory().items()}


if __name__ == "__main__":
    sys.exit(main())
