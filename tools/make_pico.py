"""Make h1r-pico, the embedded default checkpoint: a real Falcon-H1 of about a million parameters,
trained from scratch to do arithmetic with a visible trace.

    python tools/make_pico.py --minutes 65             # train, write the checkpoint, score it
    python tools/make_pico.py --minutes 65 --resume    # go on after an interruption
    python tools/make_pico.py --evaluate-only          # held-out scores of the checkpoint in --out

The task is in pico_task.py, the tokenizer in pico_tokenizer.py, the architecture in pico_model.py.
Learning rate and curriculum follow the wall clock, so a faster machine sees more problems in the
same minutes and ends with a better model; two runs on one machine differ for the same reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

# The repository's own package first, also where another version is installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pico_model import new_model  # noqa: E402
from pico_task import LEVELS, grade, held_out_problems, make_split_problem  # noqa: E402
from pico_tokenizer import PAD, build_tokenizer, chat_prompt, write_text_files  # noqa: E402

from falcon_h1r.checkpoint import save  # noqa: E402
from falcon_h1r.files import whole_file, write_file  # noqa: E402
from falcon_h1r.generation import SamplingParams, generate  # noqa: E402
from falcon_h1r.model import FalconH1ForCausalLM  # noqa: E402
from falcon_h1r.tables import aligned  # noqa: E402

# Chance of each level at the start, and after CURRICULUM of the time; in between they are mixed.
FIRST_CHANCES = dict.fromkeys(LEVELS, 0.0) | {
    "easy": 0.6,
    "medium": 0.2,
    "product": 0.1,
    "large": 0.1,
}
CHANCES = {
    "easy": 0.2,
    "medium": 0.1,
    "product": 0.12,
    "large": 0.1,
    "long": 0.08,
    "hard": 0.12,
    "cross": 0.12,
    "deep": 0.08,
    "far": 0.08,
}
CURRICULUM = 0.25

DOCUMENTS_PER_STEP = 48
DOCUMENTS_PER_PART = 12  # neighbours in length: little padding, and small activations
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.02
MAX_GRADIENT_NORM = 1.0
EVALUATION_COUNTS = {level: 500 if level == "easy" else 200 for level in LEVELS}


class Documents:
    """Training documents; those of step n depend on the seed, n and `progress` only."""

    def __init__(self, seed: int):
        self.seed = seed
        self.tokenizer = build_tokenizer()

    def rows(self, step: int, progress: float) -> list[tuple[list[int], int]]:
        """(token ids, how many of them are the prompt) of one step's documents, by length."""
        rng = random.Random(f"{self.seed} {step}")
        late = min(1.0, progress / CURRICULUM)
        weights = [FIRST_CHANCES[name] * (1 - late) + CHANCES[name] * late for name in LEVELS]
        levels = rng.choices(list(LEVELS), weights, k=DOCUMENTS_PER_STEP)
        problems = [make_split_problem(rng, level, held_out=False) for level in levels]
        prompts = [chat_prompt(problem.prompt) for problem in problems]
        texts = [prompt + problem.completion for prompt, problem in zip(prompts, problems)]
        documents = self.tokenizer.encode_batch(texts)
        lengths = [len(prompt.ids) for prompt in self.tokenizer.encode_batch(prompts)]
        rows = [(document.ids, length) for document, length in zip(documents, lengths)]
        return sorted(rows, key=lambda row: len(row[0]))


def _pad(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.full((len(rows), length), PAD)
    targets = torch.full((len(rows), length), -100)
    for row, (ids, prompt_length) in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return inputs, targets


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine to zero over the wall-clock `progress` 0..1."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list) -> tuple[float, int]:
    """One update from all ranks' shares of `rows`.

    Returns the mean loss over this rank's targets and the number of tokens in `rows`.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    all_targets = sum(len(ids) - prompt_length for ids, prompt_length in rows)
    mine = rows[rank::ranks]  # every other row of a list sorted by length: equal work
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(mine), DOCUMENTS_PER_PART):
        inputs, targets = _pad(mine[start : start + DOCUMENTS_PER_PART])
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        (loss / all_targets).backward()
        total += float(loss.detach())
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    my_targets = sum(len(ids) - prompt_length for ids, prompt_length in mine)
    return total / my_targets, sum(len(ids) for ids, _ in rows)


def save_progress(path: Path, state: dict) -> None:
    """Write a training state so that an interruption leaves the old file or the new one, whole."""
    with whole_file(path) as new:
        torch.save(state, new)


def train(model: nn.Module, args: argparse.Namespace) -> dict:
    """Train for `args.minutes` of wall-clock, time between interruption and resumption excluded.

    One process per thread, each with its share of a step's documents: operators of this size are
    too small to be shared between threads, and on a busy machine one gradient sum a step costs far
    less waiting than a barrier in every operator. Returns the final {step, seconds, tokens, seed}.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        context = multiprocessing.get_context("spawn")
        helpers = [
            context.Process(target=_train_rank, args=(rank, meeting, args), daemon=True)
            for rank in range(1, args.threads)
        ]
        for helper in helpers:
            helper.start()
        try:
            return _train_rank(0, meeting, args, model)
        finally:
            for helper in helpers:
                helper.join(timeout=10)
                helper.terminate()


def _train_rank(rank: int, meeting: str, args: argparse.Namespace, model=None) -> dict:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.threads)
    model = model or new_model(args.seed)
    documents, optimizer = Documents(args.seed), make_optimizer(model)
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "seed": args.seed}
    if args.resume:
        saved = torch.load(args.progress, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    budget = args.minutes * 60
    started = time.monotonic() - state["seconds"]
    reported = saved_at = state["seconds"]
    losses: list[float] = []
    while True:
        clock = torch.tensor([time.monotonic() - started], dtype=torch.float64)
        dist.broadcast(clock, src=0)
        state["seconds"] = clock.item()
        progress = state["seconds"] / budget
        if rank == 0 and losses and (state["seconds"] - reported > 20 or progress >= 1):
            reported = state["seconds"]
            print(
                f"{reported / 60:6.2f} min  step {state['step']:6d}  "
                f"{state['tokens'] / reported:6.0f} tokens/s  loss {sum(losses) / len(losses):.4f}",
                flush=True,
            )
            losses = []
        if rank == 0 and state["seconds"] - saved_at > args.save_every * 60:
            saved_at = state["seconds"]
            trained = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_progress(args.progress, trained | {"state": state})
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], progress)
        loss, tokens = train_step(model, optimizer, documents.rows(state["step"], progress))
        losses.append(loss)
        state["step"] += 1
        state["tokens"] += tokens
    dist.destroy_process_group()
    return state


def evaluate(model: nn.Module, counts: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Held-out problems of each level solved by greedy decoding: (right, asked)."""
    tokenizer = build_tokenizer()
    scores = {}
    for level, count in counts.items():
        problems = held_out_problems(level, count)
        right = 0
        for start in range(0, count, 100):
            batch = problems[start : start + 100]
            prompts = [tokenizer.encode(chat_prompt(problem.prompt)).ids for problem in batch]
            longest = max(len(tokenizer.encode(problem.completion).ids) for problem in batch)
            output = generate(model, prompts, SamplingParams(max_new_tokens=longest + 16))
            texts = tokenizer.decode_batch(
                [tokens.tolist() for tokens in output.sequences], skip_special_tokens=False
            )
            right += sum(map(grade, texts, batch))
        scores[level] = (right, count)
    return scores


def print_scores(scores: dict[str, tuple[int, int]]) -> None:
    rows = [("level", "right", "asked", "share")]
    for level, (right, asked) in scores.items():
        rows.append((level, str(right), str(asked), f"{right / asked:.1%}"))
    print("\n".join(aligned(rows, "lr")))


def write_facts(args: argparse.Namespace, parameters: int, done: dict, scores: dict) -> None:
    """Write OUT.training.json, beside the checkpoint: how it was made and what it scores."""
    machine = (
        f"{os.cpu_count()} x {_processor()}, {args.threads} threads, torch {torch.__version__}"
    )
    facts = {
        "command": f"python tools/make_pico.py --minutes {args.minutes:g} --seed {args.seed}",
        "finished": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "parameters": parameters,
        "minutes": round(done["seconds"] / 60, 1),
        "steps": done["step"],
        "tokens": done["tokens"],
        "problems": done["step"] * DOCUMENTS_PER_STEP,
        "tokens_per_second": round(done["tokens"] / done["seconds"]),
        "held_out_greedy": {
            level: {"right": right, "asked": asked} for level, (right, asked) in scores.items()
        },
    }
    path = args.out.with_name(args.out.name + ".training.json")
    write_file(path, json.dumps(facts, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train h1r-pico, the embedded default checkpoint, from scratch on a CPU.",
        epilog="The finished checkpoint replaces the one in --out as a whole; its scores and the "
        "way it was made go into OUT.training.json beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=65.0, help="minutes of training, scoring not counted")
    add("--seed", type=int, default=0, help="of the weights and of the training problems")
    add(
        "--out",
        type=Path,
        default=ROOT / "falcon_h1r" / "assets" / "h1r-pico",
        help="folder of the checkpoint",
    )
    add("--threads", type=int, default=2, help="CPU threads: training processes of one thread each")
    add(
        "--progress",
        type=Path,
        default=Path(tempfile.gettempdir()) / "h1r-pico-training.pt",
        help="file that keeps the training state for --resume",
    )
    add("--save-every", type=float, default=3.0, help="minutes between savings of that file")
    add("--resume", action="store_true", help="go on from --progress")
    add("--evaluate-only", action="store_true", help="score the checkpoint in --out and stop")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.threads < 1 or args.save_every <= 0:
        parser.error("--minutes, --threads and --save-every must be positive")
    if args.resume and not args.progress.is_file():
        parser.error(f"--resume: no training state at {args.progress}")
    if args.resume:
        seed = torch.load(args.progress, weights_only=True)["state"]["seed"]
        if seed != args.seed:
            parser.error(f"--seed is {args.seed}, but {args.progress} was started with {seed}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    if args.evaluate_only:
        model = FalconH1ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        print_scores(evaluate(model, EVALUATION_COUNTS))
        return 0
    model = new_model(args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters, {args.minutes:g} minutes on {args.threads} threads", flush=True
    )
    done = train(model, args)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_text_files(Path(folder))
        save(model, args.out, tokenizer_from=folder)
    scores = evaluate(model, EVALUATION_COUNTS)
    print_scores(scores)
    write_facts(args, parameters, done, scores)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
