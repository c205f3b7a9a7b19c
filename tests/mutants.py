"""Would the tests notice a fault? `make mutants` plants faults one by one, and counts those that no test notices.

mutmut makes the mutants: a `+` becomes a `−`, an argument None, a text another one. Which files it mutates and which
tests it runs stands in pyproject.toml; it works in the folder `mutants/`, which is made anew each time. The exit code
is 1 where fewer than SHARE of a file's mutants are caught. What is left stands in mutants/survivors.txt as differences
of source text, and with its reason in docs/mutants.md.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

SHARE = 0.9
CAUGHT = {1: "failed", 3: "failed", 24: "too long", -24: "too long", 36: "too long", 152: "too long"} | {
    -9: "crashed",
    -11: "crashed",
}
FOLDER = Path("mutants")


def mutmut(*words: str, quiet: bool = False) -> str:
    """Run mutmut; its output where it is `quiet`, else it is shown."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mutmut", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE if quiet else None, text=True)
    if done.returncode:
        sys.exit(f"error: mutmut {words[0]} ended with {done.returncode}: {done.stdout or 'see above'}")
    return done.stdout or ""


def names_in(file: Path) -> list[str]:
    """The names of a file's mutants."""
    made = mutate_file_contents(str(file), file.read_text(encoding="utf-8"))
    return [get_mutant_name(file, name) for name in made.mutant_names]


def exit_codes(file: Path) -> dict[str, int]:
    """What the tests of each mutant that was tried ended with."""
    codes = json.loads((FOLDER / f"{file}.meta").read_text(encoding="utf-8"))["exit_code_by_key"]
    return {name: code for name, code in codes.items() if code is not None}


def report(files: list[Path], seconds: float) -> bool:
    """Print the table and write down what was not caught; whether every file reaches SHARE."""
    enough, survivors = True, []
    print(f"\n{'file':30} mutants  caught   share  by what")
    for file in files:
        codes = exit_codes(file)
        caught = Counter(CAUGHT[code] for code in codes.values() if code in CAUGHT)
        share = caught.total() / max(1, len(codes))
        enough = enough and share >= SHARE
        how = ", ".join(f"{word} {count}" for word, count in caught.most_common())
        print(f"{file!s:30} {len(codes):7} {caught.total():7} {share:7.1%}  {how}")
        survivors += [mutmut("show", name, quiet=True) for name, code in codes.items() if code not in CAUGHT]
    (FOLDER / "survivors.txt").write_text("\n".join(survivors), encoding="utf-8")
    print(f"{len(survivors)} were not caught: {FOLDER}/survivors.txt ({seconds / 60:.0f} minutes)")
    return enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="files with any of these words in their path")
    parser.add_argument("--sample", type=int, help="as many mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--processes", type=int, default=1, help="mutants tried at once")
    options = parser.parse_args()
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    files = [Path(file) for file in settings["only_mutate"] if any(word in file for word in options.only)]
    if not files:
        sys.exit(f"error: --only {' '.join(options.only)} names none of {', '.join(settings['only_mutate'])}")
    names = []
    for file in files:
        there = names_in(file)
        draw = random.Random(options.seed)
        names += there if options.sample is None else draw.sample(there, min(options.sample, len(there)))
    shutil.rmtree(FOLDER, ignore_errors=True)
    begin = time.monotonic()
    mutmut("run", "--max-children", str(options.processes), *names)
    sys.exit(0 if report(files, time.monotonic() - begin) else 1)


if __name__ == "__main__":
    main()
