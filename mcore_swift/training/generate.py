"""`mcore-swift generate`: one answer from a Hugging Face folder or a Megatron checkpoint, through Megatron-Core itself.

Meant for looking at a model that was just trained, at the layout it was trained in. Keys and values are cached by
Megatron's static inference context. To serve a model, open the Hugging Face folder with an inference engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mcore_swift.errors import InputError
from mcore_swift.models.build import ModelSource, check_layout
from mcore_swift.parallel import ParallelPlan
from mcore_swift.platform import Platform, select
from mcore_swift.recipe import AdapterSection, DataSection, ModelSection, ParallelSection, Recipe, RuntimeSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mcore_swift.models.layers import DecoderModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest, otherwise nucleus sampling with `top_p`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def generate(
    *,
    model: Path,
    prompt: str,
    adapter: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 1234,
    raw: bool = False,
    tp: int = 1,
    pp: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Prints the model's continuation of `prompt` as it grows; returns the exit code.

    `raw` continues the text itself; otherwise the prompt is a user's turn in the tokenizer's chat template, if any.
    `adapter`: a folder of one that was trained on the model. Raises InputError for a model, an adapter or a layout that
    can't be used.
    """
    from mcore_swift.ranks import launch
    from mcore_swift.training import run as training

    platform = select(device)
    layout = ParallelSection(tp=tp, pp=pp, dp=1, sequence_parallel=False)
    recipe = Recipe(
        model=ModelSection(path=str(model)),
        data=DataSection(train=[], format="synthetic"),
        parallel=layout,
        adapter=adapter_section(adapter),
        runtime=RuntimeSection(device=device),
    )
    plan = training.plan_ranks(replace(recipe, runtime=replace(recipe.runtime, ranks=tp * pp)), platform)
    source = training.model_source(recipe)
    check_layout(source, plan)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return launch(
        lambda: _rank(recipe, source, plan, platform, prompt=prompt, raw=raw, sampling=sampling),
        ranks=plan.world_size,
        preload=lambda: training.preload(platform),
        threads=training.threads(recipe, platform, plan),
    )


def adapter_section(folder: Path | None) -> AdapterSection:
    """A recipe's, for the adapter in `folder`. Raises InputError for a folder that is none, or can't be used here."""
    from mcore_swift.peft.peft_config import OWN_CONFIG, read_json

    if folder is None:
        return AdapterSection()
    if not (folder / OWN_CONFIG).is_file():
        return AdapterSection(name="lora", path=str(folder))
    config = read_json(folder / OWN_CONFIG, "an adapter folder is needed")
    name: Any = config.get("method")
    if name not in ("bottleneck", "reft"):
        raise InputError(f"{folder / OWN_CONFIG}: method: found {name!r}; allowed: bottleneck, reft")
    if name == "reft" and config.get("last_tokens") != 0:
        raise InputError(
            f"--adapter: {folder}: LoReFT changes the last {config.get('last_tokens')} tokens of whole documents, and"
            " an answer that is still growing has no last tokens; only one with last_tokens: 0 can be used to generate"
        )
    return AdapterSection(name=name, path=str(folder))


def _rank(
    recipe: Recipe,
    source: ModelSource,
    plan: ParallelPlan,
    platform: Platform,
    *,
    prompt: str,
    raw: bool,
    sampling: Sampling,
) -> None:
    from mcore_swift import parallel
    from mcore_swift.data.tokenizer import load_tokenizer

    parallel.initialize(plan, platform, seed=sampling.seed)
    tokenizer = load_tokenizer(source.folder)
    ids = prompt_ids(tokenizer, prompt, raw=raw)
    longest = source.config.max_position_embeddings
    if len(ids) + sampling.max_new_tokens > longest:
        raise InputError(
            f"--max-new-tokens: {len(ids)} prompt tokens + {sampling.max_new_tokens} exceed the model's {longest}"
        )
    chunk = load_model(recipe, source, plan, platform)
    printed, answer = "", []
    for token in tokens(chunk, ids, sampling, stop=stop_ids(source, tokenizer)):
        answer.append(token)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        if int(os.environ["RANK"]) == 0 and not text.endswith("\ufffd"):  # half a character so far
            sys.stdout.write(text[len(printed) :])
            sys.stdout.flush()
            printed = text
    if int(os.environ["RANK"]) == 0:
        print()
    parallel.shutdown()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> list[int]:
    """The prompt's tokens: as a user's turn in the chat template, or as it is."""
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]  # type: ignore[return-value]
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the generation config's, the model config's, the tokenizer's."""
    import json

    file = source.folder / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else source.raw.get("eos_token_id")
    every: list[Any] = listed if isinstance(listed, list) else [listed]
    return {token for token in (*every, tokenizer.eos_token_id) if isinstance(token, int)}


def load_model(recipe: Recipe, source: ModelSource, plan: ParallelPlan, platform: Platform) -> DecoderModel:
    """This rank's stage of the model with its weights and the recipe's adapter, in evaluation mode."""
    import torch

    from mcore_swift.models.build import build_chunks, tensor_rules, transformer_config
    from mcore_swift.training import adapters
    from mcore_swift.training.setup import load_weights

    dtype = torch.bfloat16 if platform.default_dtype == "bf16" else torch.float32
    config = transformer_config(source, plan, platform, dtype=dtype)
    chunks = build_chunks(source, config, plan, platform)
    rules = tensor_rules(source, config)
    load_weights(recipe, source, chunks, rules)
    adapters.prepare(recipe, chunks, rules)
    return chunks[0].eval()


def tokens(chunk: DecoderModel, prompt: Sequence[int], sampling: Sampling, *, stop: set[int]) -> Iterator[int]:
    """Yields new tokens until one of `stop`, on every rank of the pipeline. Collective."""
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext

    device = next(chunk.parameters()).device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + sampling.max_new_tokens)
    ids = torch.tensor([list(prompt)], device=device)
    for _ in range(sampling.max_new_tokens):
        logits = _forward(chunk, ids, context)
        context.sequence_len_offset += ids.size(1)
        context.enable_decode_mode()
        token = _agree(None if logits is None else _sample(logits, sampling, generator), device)
        if token in stop:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def _forward(chunk: DecoderModel, ids: torch.Tensor, context: Any) -> torch.Tensor | None:
    """This stage's part of a forward pass over `ids` [1, s]; the last stage returns the last position's logits."""
    import torch
    import torch.distributed as dist

    from mcore_swift import parallel

    group, config = parallel.pp_group(), chunk.config
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with torch.no_grad():
        if rank > 0:
            hidden = torch.empty(ids.size(1), 1, config.hidden_size, dtype=config.params_dtype, device=ids.device)
            dist.recv(hidden, group=group, group_src=rank - 1)
            chunk.set_input_tensor(hidden)
        positions = torch.arange(ids.size(1), device=ids.device)[None] + context.sequence_len_offset
        if (hung := getattr(chunk, "adapters", None)) is not None:
            hung.grow(positions)
        output = chunk(ids, positions, None, inference_context=context, runtime_gather_output=True)
        if rank < size - 1:
            dist.send(output.contiguous(), group=group, group_dst=rank + 1)
            return None
        return output[0, -1, : chunk.true_vocab_size].float()


def _sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """logits: float32 [vocabulary] → a token id."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0  # the likeliest token always stays
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _agree(token: int | None, device: torch.device) -> int:
    """The token that the last stage chose, on every stage."""
    import torch
    import torch.distributed as dist

    from mcore_swift import parallel

    group = parallel.pp_group()
    shared = torch.tensor(token or 0, device=device)
    if dist.get_world_size(group) > 1:
        dist.broadcast(shared, group=group, group_src=dist.get_world_size(group) - 1)
    return int(shared)
