"""Conversion speed beside `cp -r` and transformers' load + save of the same folder, on the same disk, in turns.

    python -m perf.bench_convert FOLDER [--layers 28] [--rounds 1] [--without CONTENDER] [--output result.json]

Makes a Qwen3-shaped model of about 4 GB (28 layers) in FOLDER, and deletes it at the end. Each contender runs in a fork
of this process, so imports don't count for any of them. Warm: the source is in the page cache; cold: it was dropped.
`synced` is the time until everything is on the disk. Memory: the peak of the process, and what its workers have of
their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import threading
import time
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
OTHERS = ("mcore_bridge", "megatron.bridge")


@dataclass(frozen=True)
class Row:
    """One measurement. Speeds are megabytes of tensors a second."""

    contender: str
    direction: str
    cache: str
    seconds: float
    speed: float
    synced_seconds: float
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
    """Takes a folder's files out of the page cache (they must be on the disk already)."""
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


def _ours(workers: int) -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        assert cli.main(["convert", str(source), str(target), "--workers", str(workers)]) == 0

    return run


def run_rounds(folder: Path, num_bytes: int, *, rounds: int, without: str | None) -> Iterator[Row]:
    """All contenders in turns: to Megatron and back, warm and cold."""
    model, megatron, out = folder / "model", folder / "megatron", folder / "out"
    ours = {f"mcore-swift, {n} worker{'s'[: n > 1]}": _ours(n) for n in (1, 2, 4)}
    for _ in range(rounds):
        for cache in ("warm", "cold"):
            for direction, source in (("to Megatron", model), ("to Hugging Face", megatron)):
                contenders: dict[str, Callable[[Path, Path], None]] = {"cp -r": _cp, **ours}
                if source == model:
                    contenders["transformers load + save"] = _transformers
                for name, work in contenders.items():
                    if name == without:
                        continue
                    (warm_cache if cache == "warm" else drop_cache)(source)
                    seconds, synced, peak = measure(lambda work=work, source=source: work(source, out))
                    if direction == "to Megatron" and work in ours.values() and not megatron.exists():
                        out.rename(megatron)
                    shutil.rmtree(out, ignore_errors=True)
                    yield Row(name, direction, cache, seconds, num_bytes / seconds / 1e6, synced, peak)


def with_ratios(rows: list[Row]) -> list[Row]:
    """The best of each contender's rounds, with its speed beside cp's."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.direction, row.cache, row.contender)
        if key not in best or row.seconds < best[key].seconds:
            best[key] = row
    return [
        replace(row, of_cp=row.speed / best[direction, cache, "cp -r"].speed)
        for (direction, cache, _), row in sorted(best.items(), reverse=True)
    ]


def _table(rows: list[Row]) -> str:
    lines = ["| direction | cache | contender | MB/s | of cp | s | s until synced | peak memory |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        lines.append(
            f"| {row.direction} | {row.cache} | {row.contender} | {row.speed:,.0f} | {row.of_cp:.2f} |"
            f" {row.seconds:.1f} | {row.synced_seconds:.1f} | {row.peak_memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to work; on the disk to be measured, with room for 4 copies")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--without", metavar="CONTENDER", help="leave one out, such as 'transformers load + save'")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    from transformers import Qwen3ForCausalLM

    assert Qwen3ForCausalLM  # imported before the forks
    folder = options.folder / "bench_convert"
    try:
        num_bytes = make_model(folder / "model", options.layers)
        largest = max(spec.nbytes for spec in qwen3_tensors(options.layers).values())
        print(f"model: {num_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
        cli.main(["convert", str(folder / "model"), str(folder / "out"), "--dry-run"])  # imports what it needs
        rows = []
        for row in run_rounds(folder, num_bytes, rounds=options.rounds, without=options.without):
            print(f"{row.direction}, {row.cache}, {row.contender}: {row.speed:,.0f} MB/s", flush=True)
            rows.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = with_ratios(rows)
    print(_table(rows))
    for package in OTHERS:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        print(f"{package}: {'installed, but not measured here' if found else 'not installed, not measured'}")
    if options.output:
        options.output.write_text(json.dumps({"bytes": num_bytes, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
