"""Conversion speed beside `cp -r` and transformers' load + save of the same folder, on the same disk, in turns.

    python -m perf.bench_convert FOLDER [--layers 28] [--rounds 2] [--minutes 8] [--other NAME=COMMAND] [--output FILE]

Makes a Qwen3-shaped model of about 4 GB (28 layers) in FOLDER, and deletes it at the end. In each round every contender
runs once in each direction, from a warm cache (the source was just read) and from a cold one (it was dropped); the best
round counts. Each contender runs in a fork of this process, so imports don't count for any of them. Speeds are until
everything is on the disk, for everybody: `convert` syncs its files itself, the rest is waited for. Memory: the peak of
the process, and what its workers have of their own; at the end also for a model of twice the size.

Another program takes part with its command, in an environment of its own: --other "mcore-bridge=/venv/bin/swift export
--model {source} --to_mcore true --output_dir {target}". Its imports count, and it is only run to Megatron.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mcore_swift import cli
from mcore_swift.weights import safetensors_io as st

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "dtype": "bfloat16",
}
SHARD_BYTES = 2 * 10**9
OTHERS = ("mcore-bridge", "megatron-bridge")  # said to be missing where --other doesn't give their commands
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
Contender = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Row:
    """One measurement. speed: megabytes of tensors a second, until they are on the disk."""

    contender: str
    direction: str
    cache: str
    seconds: float
    synced_seconds: float
    speed: float
    peak_memory: float  # bytes
    of_cp: float = 0.0  # speed beside cp's of the same direction and cache


def qwen3_tensors(layers: int) -> dict[str, st.TensorSpec]:
    """The tensors of the benchmark's model."""
    hidden, ffn, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = SHAPE["num_attention_heads"] * head, SHAPE["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (SHAPE["vocab_size"], hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (queries, hidden),
            layer + "self_attn.k_proj.weight": (keys, hidden),
            layer + "self_attn.v_proj.weight": (keys, hidden),
            layer + "self_attn.o_proj.weight": (hidden, queries),
            layer + "self_attn.q_norm.weight": (head,),
            layer + "self_attn.k_norm.weight": (head,),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (SHAPE["vocab_size"], hidden)}
    return {name: st.TensorSpec("BF16", shape) for name, shape in shapes.items()}


def make_model(folder: Path, layers: int) -> int:
    """Writes the model, random finite bf16 values; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}, indent=2))
    specs = qwen3_tensors(layers)
    plan = st.plan_output(specs, max_shard_bytes=SHARD_BYTES)
    st.create_files(folder, plan)
    # Exponents are kept below 2^-1: every value is finite. The pool's length is odd: tensors differ.
    pool = np.random.default_rng(0).integers(0, 1 << 16, (48 << 20) + 1, dtype=np.uint16) & np.uint16(0xBEFF)
    start = 0
    for name, spec in specs.items():
        file, offset = plan.places[name]
        left = spec.nbytes // 2
        with (folder / file).open("r+b") as handle:
            handle.seek(offset)
            while left:
                part = pool[start : start + left]
                handle.write(part.tobytes())
                left, start = left - part.size, (start + part.size) % pool.size
    return sum(spec.nbytes for spec in specs.values())


def drop_cache(folder: Path) -> None:
    """Takes a folder's files out of the page cache (they must be on the disk already); all files, where we may."""
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("1")
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass


# --- one measurement --------------------------------------------------------------------------------------------------


def _private_bytes(pid: str) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_"))


def _resident(pid: int) -> int:
    """Resident bytes of a process, and of its children what they share with no one."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_private_bytes(child) for child in children)


def measure(work: Callable[[], None]) -> tuple[float, float, int]:
    """Runs `work` in a fork: seconds, seconds until it is on the disk, peak resident bytes."""
    os.sync()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            begun = time.perf_counter()
            work()
            seconds = time.perf_counter() - begun
            os.write(writer, repr(seconds).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            try:
                peak[0] = max(peak[0], _resident(pid))
            except (OSError, IndexError):  # it, or a worker, has just ended
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    text = os.read(reader, 100)
    begun = time.perf_counter()
    os.sync()
    synced = time.perf_counter() - begun
    os.waitpid(pid, 0)
    stop.set()
    thread.join()
    os.close(reader)
    if not text:
        raise RuntimeError("a contender failed")
    return float(text), float(text) + synced, peak[0]


def _cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)


def _transformers(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


def _ours(workers: int | None) -> Contender:
    def run(source: Path, target: Path) -> None:
        options = ["--workers", str(workers)] if workers else []
        assert cli.main(["convert", str(source), str(target), *options]) == 0

    return run


def _command(text: str) -> Contender:
    def run(source: Path, target: Path) -> None:
        words = [word.replace("{source}", str(source)).replace("{target}", str(target)) for word in shlex.split(text)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    return run


# --- the turns --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """One model in its own folder. `others`: contenders that only go to Megatron, by name."""

    folder: Path
    num_bytes: int
    others: dict[str, Contender]

    def round(self) -> Iterator[Row]:
        """All contenders in turns: to Megatron and back, warm and cold."""
        ours = {f"mcore-swift, {n} worker{'s'[: n > 1]}": _ours(n) for n in (1, 2, 4)}
        for cache in ("warm", "cold"):
            for direction in ("to Megatron", "to Hugging Face"):
                contenders = {"cp -r": _cp, **ours}
                if direction == "to Megatron":
                    contenders |= {"transformers load + save": _transformers, **self.others}
                for name, work in contenders.items():
                    row = self.run(name, work, direction, cache)
                    if row is not None:
                        yield row

    def run(self, name: str, work: Contender, direction: str, cache: str) -> Row | None:
        """One contender's turn; None, said aloud, when it fails."""
        model, megatron, out = (self.folder / name for name in ("model", "megatron", "out"))
        source = model if direction == "to Megatron" else megatron
        (warm_cache if cache == "warm" else drop_cache)(source)
        try:
            seconds, synced, peak = measure(lambda: work(source, out))
        except RuntimeError:
            print(f"{direction}, {cache}, {name}: FAILED", flush=True)
            return None
        finally:
            if name.startswith("mcore-swift") and source == model and out.exists() and not megatron.exists():
                out.rename(megatron)
            shutil.rmtree(out, ignore_errors=True)
        row = Row(name, direction, cache, seconds, synced, self.num_bytes / synced / 1e6, peak)
        print(f"{direction}, {cache}, {name}: {row.speed:,.0f} MB/s, {peak / 1e9:.2f} GB", flush=True)
        return row


@contextlib.contextmanager
def bench(folder: Path, layers: int, others: dict[str, Contender]) -> Iterator[Bench]:
    """Makes the model, and deletes everything afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        num_bytes = make_model(folder / "model", layers)
        largest = max(spec.nbytes for spec in qwen3_tensors(layers).values())
        print(f"model: {num_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB", flush=True)
        yield Bench(folder, num_bytes, others)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def twice_as_large(layers: int) -> int:
    """The number of layers of a model with twice the bytes."""
    total, less = (sum(spec.nbytes for spec in qwen3_tensors(n).values()) for n in (layers, layers - 1))
    return layers + -(-total // (total - less))


def with_ratios(rows: list[Row]) -> list[Row]:
    """The best of each contender's rounds, with its speed beside cp's."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.direction, row.cache, row.contender)
        if key not in best or row.synced_seconds < best[key].synced_seconds:
            best[key] = row
    copies = {key[:2]: row.speed for key, row in best.items() if key[2] == "cp -r"}
    return [
        replace(row, of_cp=row.speed / copies.get(key[:2], float("nan")))
        for key, row in sorted(best.items(), key=lambda item: (item[0][:2], -item[1].speed), reverse=False)
    ]


def _table(rows: list[Row]) -> str:
    lines = ["| direction | cache | contender | MB/s | of cp | s until synced | s alone | peak memory |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        lines.append(
            f"| {row.direction} | {row.cache} | {row.contender} | {row.speed:,.0f} | {row.of_cp:.2f} |"
            f" {row.synced_seconds:.1f} | {row.seconds:.1f} | {row.peak_memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; on the disk to be measured, with room for 4 copies")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8.0, help="no new round begins when it would take longer")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    others = {name: _command(command) for name, _, command in (text.partition("=") for text in options.other)}
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    assert AutoModelForCausalLM and Qwen3ForCausalLM  # imported before the forks
    begun = time.perf_counter()
    load, cpus = os.getloadavg()[0], os.cpu_count()
    print(f"{cpus} CPUs, load {load:.1f}{' — NOT a quiet machine' if load > 0.5 else ''}", flush=True)
    folder, rows, twice = options.folder / "bench_convert", [], []
    with bench(folder, options.layers, others) as turns:
        cli.main(["convert", str(turns.folder / "model"), str(turns.folder / "out"), "--dry-run"])  # imports
        for number in range(options.rounds):
            if number and (time.perf_counter() - begun) * (number + 1) / number > options.minutes * 60:
                print(f"{number} of {options.rounds} rounds: time is up")
                break
            rows += turns.round()
    with bench(folder, twice_as_large(options.layers), {}) as turns:
        for direction in ("to Megatron", "to Hugging Face"):
            twice.append(turns.run("mcore-swift, default workers, twice the size", _ours(None), direction, "warm"))
    rows = [*with_ratios(rows), *(row for row in twice if row is not None)]
    print(f"\n{cpus} CPUs, load {load:.1f} at the beginning, {time.perf_counter() - begun:.0f} s\n\n{_table(rows)}")
    for name in OTHERS:
        if name not in others:
            print(f"{name}: not installed here, not measured (--other gives its command)")
    if options.output:
        options.output.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
