"""Held-out problems of h1r-pico with their answers, as `falcon-h1r think --questions` reads them.

python tools/pico_questions.py --levels hard cross deep far --count 50 > questions.jsonl
"""

from __future__ import annotations

import argparse
import json

from pico_task import LEVELS, held_out_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["cross", "deep"])
    parser.add_argument("--count", type=int, default=50, help="problems of each level; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other problems")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count is {args.count}, expected a positive integer")
    for level in args.levels:
        for problem in held_out_problems(level, args.count, args.seed):
            print(json.dumps({"question": problem.prompt, "reference": str(problem.answer)}))


if __name__ == "__main__":
    main()
