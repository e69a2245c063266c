"""Generation with an adapter gives the tokens of transformers' model with the same adapter, at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift.errors import InputError
from mcore_swift.recipe import AdapterSection, ParallelSection
from mcore_swift.training.generate import adapter_section
from tests.distributed.harness import run_ranks
from tests.peft import test_bottleneck, test_reft
from tests.peft.test_lora import ALL, peft_folder
from tests.training.test_generate import GREEDY, PROMPT, rank_tokens

FIRST = 2


def lora(model: Path) -> Path:
    return peft_folder(model, model.parent / "qwen3-dora", "dora", ALL)


def bottleneck(model: Path) -> Path:
    return test_bottleneck.folder_of(model, "gelu")


def reft(model: Path) -> Path:
    folder = test_reft.folder_of(model)
    (folder / "adapter.json").write_text(json.dumps(test_reft.SETTINGS | {"first_tokens": FIRST, "last_tokens": 0}))
    return folder


def hang_reft(model: Any, folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")

    def change(place: str, module: Any, args: Any, output: Any) -> Any:
        r, weight, bias = (tensors[f"{place}.reft_{kind}"] for kind in ("r", "weight", "bias"))
        h = output[0] if isinstance(output, tuple) else output
        h = torch.cat([h[:, :FIRST] + (h[:, :FIRST] @ weight.T + bias - h[:, :FIRST] @ r.T) @ r, h[:, FIRST:]], dim=1)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    for place in dict.fromkeys(name.split(".reft_")[0] for name in tensors):
        model.get_submodule(place).register_forward_hook(partial(change, place))


def _expected(folder: Path, adapter: Path, method: str) -> list[int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    elif method == "bottleneck":
        test_bottleneck.hang("gelu", model, load_file(adapter / "adapter.safetensors"))
    else:
        hang_reft(model, adapter)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):  # no cache: what is cached has passed the adapter
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(lora, ParallelSection(tp=2, sequence_parallel=False), marks=pytest.mark.slow, id="lora-TP2"),
        pytest.param(lora, ParallelSection(pp=2), marks=pytest.mark.nightly, id="lora-PP2"),
        pytest.param(bottleneck, ParallelSection(pp=2), marks=pytest.mark.slow, id="bottleneck-PP2"),
        pytest.param(bottleneck, ParallelSection(tp=2, sequence_parallel=False), marks=pytest.mark.nightly, id="b-TP2"),
        pytest.param(reft, ParallelSection(), marks=pytest.mark.nightly, id="reft-one rank"),
        pytest.param(reft, ParallelSection(tp=2, pp=2, sequence_parallel=False), marks=pytest.mark.nightly, id="reft"),
    ],
)
def test_tokens(models: Any, make: Callable[[Path], Path], layout: ParallelSection) -> None:
    model = models("qwen3")
    adapter = make(model)
    ranks = layout.tp * layout.pp
    run = partial(run_ranks, rank_tokens, ranks, model, layout, GREEDY, set())
    found, plain = run(adapter_section(adapter)), run(AdapterSection())
    assert all(tokens == found[0] for tokens in found) and found[0] != plain[0]
    assert found[0] == run_ranks(_expected, 1, model, adapter, make.__name__)[0]


def test_sections(tmp_path: Path) -> None:
    assert adapter_section(None) == AdapterSection()
    assert adapter_section(tmp_path) == AdapterSection(name="lora", path=str(tmp_path))
    for config, message in (
        ({"method": "ia3"}, r"method: found 'ia3'; allowed: bottleneck, reft"),
        ({"method": "reft", "last_tokens": 4}, r"last 4 tokens of whole documents, .* only one with last_tokens: 0"),
    ):
        (tmp_path / "adapter.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            adapter_section(tmp_path)
