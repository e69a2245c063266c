"""`mcore-swift VERB`: the command line that scripts depend on.

A verb is one `_add_*` function for its options and one function that runs it; a verb imports what it needs when it
runs, so that `mcore-swift --help` answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mcore_swift.errors import EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN, InputError, NeverRestart, StopRequested

EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (see `errors`); other failures are left to Python's traceback."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except InputError as error:
        print(f"mcore-swift: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except StopRequested as stop:
        print(f"mcore-swift: stopped: {stop}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    except NeverRestart as error:
        print(f"mcore-swift: not to be started again: {error}", file=sys.stderr)
        return EXIT_NEVER_RESTART
    except KeyboardInterrupt:
        print("mcore-swift: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(argv: list[str]) -> int:
    words, overrides = _split_overrides(argv) if argv[:1] in (["train"], ["plan"], ["launch"]) else (argv, [])
    arguments = vars(build_parser().parse_args(words))
    verb: Callable[..., int] = arguments.pop("run")
    if overrides:
        arguments["overrides"] = overrides
    return verb(**arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mcore-swift",
        description="A Hugging Face folder goes in, Megatron-Core trains it at any layout, a Hugging Face folder "
        "comes out.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong input; 75 stopped on request, start it again; 93 not "
        "to be started again.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_train(verbs.add_parser("train", help="train a model as a recipe says", allow_abbrev=False))
    _add_plan(verbs.add_parser("plan", help="say what a recipe means on a number of GPUs", allow_abbrev=False))
    _add_generate(verbs.add_parser("generate", help="let a model answer a prompt", allow_abbrev=False))
    _add_convert(verbs.add_parser("convert", help="Hugging Face to Megatron, and back; GGUF", allow_abbrev=False))
    _add_verify(verbs.add_parser("verify", help="are two models the same? tensors, config, logits", allow_abbrev=False))
    _add_inspect(verbs.add_parser("inspect", help="say what a folder or file of weights holds", allow_abbrev=False))
    _add_merge(verbs.add_parser("merge", help="fold a PEFT LoRA adapter into its base model", allow_abbrev=False))
    _add_launch(verbs.add_parser("launch", help="turn a recipe into a running job", allow_abbrev=False))
    data = verbs.add_parser("data", help="check or prepare training data", allow_abbrev=False)
    data_verbs = data.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_validate(data_verbs.add_parser("validate", help="report every bad row", allow_abbrev=False))
    _add_prepare(data_verbs.add_parser("prepare", help="tokenize texts for pretraining", allow_abbrev=False))
    return parser


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--section.key VALUE` and `--section.key=VALUE`, which argparse can't know, out of a verb's words."""
    words: list[str] = []
    overrides: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not re.match(r"--\w+\.", word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" not in word:
            overrides += [value for value in [next(rest, None)] if value is not None]
    return words, overrides


def _number(kind: type[int] | type[float], bound: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type whose error says what is allowed."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")  # fails every bound
        if not holds(value):
            raise argparse.ArgumentTypeError(f"found {text!r}; it must be {bound}")
        return value

    return read


_COUNT = _number(int, "a whole number, at least 1", lambda x: x >= 1)
_SEED = _number(int, "a whole number, at least 0", lambda x: x >= 0)
_TEMPERATURE = _number(float, "a number, at least 0", lambda x: 0 <= x < float("inf"))
_SHARE = _number(float, "a number between 0 and 1", lambda x: 0 <= x <= 1)
_FRACTION = _number(float, "a number greater than 0, at most 1", lambda x: 0 < x <= 1)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RECIPE [--section.key VALUE ...] [--print-recipe] [--help-recipe]"
    parser.description = (
        "Trains on this machine's ranks, or joins torchrun or srun. Any key of the recipe can be set on the command "
        "line, such as --parallel.tp 2 or --data.train a.jsonl; values are YAML, and the last one of a key counts."
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, nargs="?", help="YAML file")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--help-recipe", action="store_true", help="print every key of a recipe and stop")
    parser.set_defaults(run=_train)


def _train(*, recipe: Path | None, print_recipe: bool, help_recipe: bool, overrides: Sequence[str] = ()) -> int:
    from mcore_swift import stop

    with stop.listening():  # before anything slow is imported
        from mcore_swift import recipe_io
        from mcore_swift.recipe_checks import check_recipe
        from mcore_swift.training import heartbeat

        if help_recipe:
            print(recipe_io.recipe_help(), end="")
            return 0
        if recipe is None:
            raise InputError("train needs a RECIPE, a YAML file; mcore-swift train --help-recipe prints its keys")
        heartbeat.start()
        resolved = recipe_io.load_recipe(recipe, overrides)
        check_recipe(resolved)
        if print_recipe:
            print(recipe_io.dump_recipe(resolved), end="")
            return 0
        recipe_io.check_files(resolved)
        from mcore_swift.training.run import run

        return run(resolved)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RECIPE [--section.key VALUE ...] [--gpus N] [--build] [--json], or --explain"
    parser.description = (
        "Computes what a recipe's layout means, before anything runs: ranks, micro-batches, pipeline stages and their "
        "idle time, parameters and bytes of each stage's ranks. With --build, Megatron's own modules of a rank of each "
        "kind are built, without their storage, and held against the model; exit code 1: they don't fit."
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, nargs="?", help="YAML file")
    help_text = "size of the job; default: runtime.ranks, or what the layout needs"
    parser.add_argument("--gpus", "--ranks", metavar="N", type=_COUNT, help=help_text)
    parser.add_argument("--build", action="store_true", help="build a rank of each kind and check them")
    parser.add_argument("--explain", action="store_true", help="print every rule that recipes are held to, and stop")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_plan)


def _plan(*, overrides: Sequence[str] = (), **options: Any) -> int:
    from perf.plan import plan

    return plan(options.pop("recipe"), overrides=overrides, **options)


def _add_launch(parser: argparse.ArgumentParser) -> None:
    from launch.kubernetes.options import add_kubernetes
    from launch.slurm.options import add_slurm

    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_slurm(verbs.add_parser("slurm", help="submit it to Slurm", allow_abbrev=False), count=_COUNT, natural=_SEED)
    kubernetes = verbs.add_parser("kubernetes", help="print what Kubernetes needs to run it", allow_abbrev=False)
    add_kubernetes(kubernetes, count=_COUNT, natural=_SEED)
    _add_launch_without_scheduler(verbs)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--adapter", metavar="FOLDER", type=Path, help="PEFT LoRA, bottleneck or LoReFT on that model")
    parser.add_argument("--max-new-tokens", metavar="N", type=_COUNT, default=128, help="default: %(default)s")
    parser.add_argument("--temperature", metavar="T", type=_TEMPERATURE, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top-p", metavar="P", type=_FRACTION, default=1.0, help="default: %(default)s, all tokens")
    parser.add_argument("--seed", metavar="S", type=_SEED, default=1234, help="of the sampling; default: %(default)s")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    parser.add_argument("--tp", metavar="N", type=_COUNT, default=1, help="tensor parallel size")
    parser.add_argument("--pp", metavar="N", type=_COUNT, default=1, help="pipeline stages")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    parser.set_defaults(run=_generate)


def _generate(**options: Any) -> int:
    from mcore_swift.training.generate import generate

    return generate(**options)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Hugging Face folder to Megatron checkpoint, Megatron checkpoint to Hugging Face folder, GGUF file to Hugging "
        "Face folder: found from the contents. DST appears when it is complete; an interrupted run is taken up again."
    )
    parser.add_argument("source", metavar="SRC", help="folder, GGUF file, or hub id in the local cache")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: each tensor's own")
    parser.add_argument("--workers", metavar="N", type=_COUNT, help="processes; default: as many as help")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file, such as 500MB; default: 5GB")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and written, and stop")
    parser.add_argument("--config", metavar="FOLDER", type=Path, help="of a Megatron checkpoint that lacks hf/")
    parser.add_argument("--strict", action="store_true", help="refuse NaN and infinite values")
    parser.add_argument("--optimizer", action="store_true", help="a Megatron checkpoint's optimizer state, too")
    parser.add_argument("--download", action="store_true", help="fetch a hub id that is not in the local cache")
    parser.set_defaults(run=_convert)


def _convert(**options: Any) -> int:
    from ckpt_tools.convert import convert_verb

    return convert_verb(**options)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares two models tensor by tensor under their Hugging Face names, and their configurations. Exit code 0: "
        "the same; 1: not. With --logits, on a text too: a Megatron checkpoint runs through Megatron-Core and a "
        "Hugging Face folder through transformers, but B through Megatron-Core when both are Hugging Face folders."
    )
    for name in "AB":
        parser.add_argument(name.lower(), metavar=name, type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument(
        "--any-dtype", action="store_true", help="dtypes may differ; values are compared in the coarser"
    )
    parser.add_argument(
        "--max-ulp", metavar="N", type=_SEED, default=0, help="allowed units in the last place; default: 0"
    )
    parser.add_argument("--config", metavar="FOLDER", type=Path, help="of a Megatron checkpoint that lacks hf/")
    parser.add_argument("--logits", action="store_true", help="compare logits on a text; needs --text")
    parser.add_argument("--text", metavar="FILE", type=Path, help="plain text, or JSONL with a text in each row")
    parser.add_argument(
        "--windows", metavar="N", type=_COUNT, default=4, help="pieces of the text; default: %(default)s"
    )
    parser.add_argument(
        "--window-length", metavar="N", type=_COUNT, default=256, help="tokens each; default: %(default)s"
    )
    limits = parser.add_argument_group("what logits must keep")
    help_text = "largest difference of two logits, relative to the largest logit; default: %(default)s"
    limits.add_argument("--max-difference", metavar="X", type=_TEMPERATURE, default=1e-5, help=help_text)
    help_text = "share of positions with the same likeliest token; default: %(default)s"
    limits.add_argument("--min-top1", metavar="P", type=_SHARE, default=1.0, help=help_text)
    help_text = "largest KL divergence of a position, in nats; default: %(default)s"
    limits.add_argument("--max-kl", metavar="K", type=_TEMPERATURE, default=1e-8, help=help_text)
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the whole result as JSON")
    parser.set_defaults(run=_verify)


def _verify(**options: Any) -> int:
    from ckpt_tools.verify import verify

    return verify(**options)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="model folder, checkpoint, adapter, .safetensors or .gguf"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON in place of tables")
    help_text = "read all of a run's checkpoint: is it what was written? exit code 1 if not"
    parser.add_argument("--check", action="store_true", help=help_text)
    parser.set_defaults(run=_inspect)


def _inspect(**options: Any) -> int:
    from ckpt_tools.inspect import inspect

    return inspect(**options)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="Hugging Face folder")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="PEFT LoRA folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="Hugging Face folder to write; must not exist")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the base's own dtypes")
    parser.set_defaults(run=_merge)


def _merge(*, base: Path, adapter: Path, destination: Path, dtype: str | None) -> int:
    from ckpt_tools.merge import merge

    merge(base, adapter, destination, dtype=dtype)
    print(f"{destination}: {base} with {adapter} merged")
    return 0


def _add_launch_without_scheduler(verbs: Any) -> None:
    from launch.slurm.options import add_recovery

    local = verbs.add_parser("local", help="on this machine", allow_abbrev=False)
    local.usage = "%(prog)s RECIPE [--section.key VALUE ...] [options]"
    local.set_defaults(run=_launch_local)
    ssh = verbs.add_parser("ssh", help="on the hosts of a file, without a scheduler", allow_abbrev=False)
    ssh.usage = "%(prog)s HOSTFILE RECIPE [--section.key VALUE ...] [options]"
    ssh.add_argument("hostfile", metavar="HOSTFILE", type=Path, help="a host a line, in rank order; # comments")
    ssh.add_argument("--ranks-per-node", metavar="N", type=_COUNT, help="default: this machine's GPUs")
    ssh.add_argument("--spares", metavar="N", type=_SEED, default=0, help="last hosts to keep for failures; default: 0")
    ssh.add_argument("--address", metavar="HOST", help="of this machine, for the hosts; default: its name")
    help_text = "how a host is reached; default: %(default)s"
    ssh.add_argument("--ssh", metavar="COMMAND", default="ssh -o BatchMode=yes -o ConnectTimeout=10", help=help_text)
    ssh.set_defaults(run=_launch_ssh)
    for parser in (local, ssh):
        parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file; its checkpoint.dir is the run")
        add_recovery(parser, count=_COUNT, natural=_SEED)
    status = verbs.add_parser("status", help="say how a run is doing", allow_abbrev=False)
    status.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")
    status.add_argument("--json", dest="as_json", action="store_true", help="print JSON in place of text")
    status.set_defaults(run=_launch_status)


def _launch_local(*, recipe: Path, overrides: Sequence[str] = (), **options: Any) -> int:
    from launch.local import launch_local

    return launch_local(recipe, overrides=overrides, **options)


def _launch_ssh(*, hostfile: Path, recipe: Path, overrides: Sequence[str] = (), **options: Any) -> int:
    from launch.ssh import launch_ssh

    return launch_ssh(hostfile, recipe, overrides=overrides, **options)


def _launch_status(*, folder: Path, as_json: bool) -> int:
    from launch.status import status

    return status(folder, as_json=as_json)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSONL, JSON or Parquet")
    formats = ["auto", "messages", "prompt_response", "text", "preference", "labelled", "chosen"]
    parser.add_argument("--format", choices=formats, default="auto", help="default: %(default)s")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="check what only tokens show, such as length")
    parser.add_argument("--sequence-length", metavar="N", type=_COUNT, help="the longest row; needs --tokenizer")
    parser.set_defaults(run=_validate)


def _validate(*, files: list[Path], format: str, tokenizer: Path | None, sequence_length: int | None) -> int:
    if sequence_length is not None and tokenizer is None:
        raise InputError("--sequence-length counts tokens: it needs --tokenizer FOLDER")
    from mcore_swift.data.sources import find_files
    from mcore_swift.data.tokenizer import load_tokenizer
    from mcore_swift.data.validate import validate

    found = find_files(files)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    problems = validate(found, tokenizer=loaded, format=format, sequence_length=sequence_length)
    for problem in problems:
        print(problem)
    bad_files = len({problem.file for problem in problems})
    print(
        f"{len(found)} files checked: " + (f"{len(problems)} problems in {bad_files} of them" if problems else "good")
    )
    return EXIT_INPUT if problems else 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="JSONL, JSON or Parquet with texts")
    parser.add_argument("--output", metavar="PREFIX", type=Path, required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--workers", metavar="N", type=_COUNT, default=1, help="default: %(default)s")
    parser.add_argument("--no-eod", action="store_true", help="no end-of-document token after each text")
    parser.set_defaults(run=_prepare)


def _prepare(*, files: list[Path], output: Path, tokenizer: Path, workers: int, no_eod: bool) -> int:
    from mcore_swift.data.prepare import prepare
    from mcore_swift.data.sources import find_files
    from mcore_swift.data.tokenizer import load_tokenizer

    found = find_files(files)
    counts = prepare(found, output, tokenizer=load_tokenizer(tokenizer), append_eod=not no_eod, workers=workers)
    print(
        f"{output}.bin and {output}.idx: {counts['documents']:,} documents, {counts['tokens']:,} tokens "
        f"in {counts['seconds']:.1f} seconds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
