"""``launch array``: a corpus tokenised in parts by an array of jobs, and a job that merges the parts when all are done."""

from __future__ import annotations

import argparse
from pathlib import Path

from unfold.launch.profile import Profile, read_profile
from unfold.launch.scripts import render, safe_name, sbatch_options
from unfold.launch.submit import Job, cancel, submit, write_new
from unfold.pretrain.errors import UserError


def tokenize_words(words: list[str]) -> tuple[str, list[str]]:
    """The output prefix and the suffixes of its shards, from the arguments of ``data_prep tokenize``. Raises UserError."""
    words = words[1:] if words[:1] == ["--"] else words
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output")
    parser.add_argument("--valid-fraction")
    parser.add_argument("--part")
    try:
        known, _ = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit):
        known = argparse.Namespace(output=None, valid_fraction=None, part=None)
    if not known.output:
        raise UserError("launch array: give the arguments of `data_prep tokenize` after --, with --output PREFIX among them")
    if known.part:
        raise UserError("--part: is given by `launch array` itself; leave it out after --")
    return known.output, ["_train", "_valid"] if known.valid_fraction else [""]


def array_scripts(args: argparse.Namespace, profile: Profile, directory: Path) -> tuple[str, str]:
    """The scripts of the array and of the merge; the second's dependency is ``afterok:ARRAY``."""
    words = args.tokenize[1:] if args.tokenize[:1] == ["--"] else args.tokenize
    prefix, suffixes = tokenize_words(words)
    for name, least in (("parts", 1), ("limit", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: is below {least}")
    name = profile.job_name or safe_name(Path(prefix).name)
    log = directory / f"{safe_name(name)}-%A.%a.log"
    options = sbatch_options(profile, name, log, 1, Path.cwd())
    limit = f"%{args.limit}" if args.limit else ""
    options += [f"--array=1-{args.parts}{limit}", "--requeue" if profile.requeue else "--no-requeue"]
    inside = [directory]
    shared = {"parts": args.parts, "prefix": prefix, "suffixes": suffixes}
    array = render("array", profile, options, Path.cwd(), inside, words=words, **shared)
    merge_log = directory / f"{safe_name(name)}-merge-%j.log"
    options = sbatch_options(profile, f"{name}-merge", merge_log, 1, Path.cwd(), "afterok:ARRAY")
    merge = render("merge", profile, options, Path.cwd(), inside, overwrite="--overwrite" in words, **shared)
    return array, merge


def submit_array(args: argparse.Namespace, profile: Profile, directory: Path) -> list[Job]:
    """Submit both; the merge waits for the array, and is cancelled by SLURM when a part fails."""
    array, merge = array_scripts(args, profile, directory)
    name = safe_name(profile.job_name or Path(tokenize_words(args.tokenize)[0]).name)
    first = submit(write_new(directory, name, ".sbatch", array), "array", directory / f"{name}-%A.%a.log")
    merge = merge.replace("afterok:ARRAY", f"afterok:{first.number}")
    try:
        script = write_new(directory, f"{name}-merge", ".sbatch", merge)
        return [first, submit(script, "merge", directory / f"{name}-merge-%j.log")]
    except UserError:
        cancel([first])
        raise


def run_array(args: argparse.Namespace) -> int:
    """``launch array``."""
    profile = read_profile(args).for_cpu_jobs()
    prefix, _ = tokenize_words(args.tokenize)
    directory = (args.job_dir or Path(f"{prefix}.launch")).resolve()
    if args.dry_run:
        print(*array_scripts(args, profile, directory), sep="\n", end="")
        return 0
    array, merge = submit_array(args, profile, directory)
    log = Path(array.log)
    print(f"job {array.number}: {args.parts} parts of {prefix}; log: {log.with_name(log.name.replace('%a', 'PART'))}")
    print(f"job {merge.number}: merges them when all are done; log: {merge.log}")
    print(f"scripts: {array.script} {merge.script}")
    return 0
