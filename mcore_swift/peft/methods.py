"""The adapters that PEFT has no format for, by the recipe's adapter.name.

Each is a module with the same three: `Settings`, `settings_of(section, seed)` and `attach(chunks, rules, settings)`. A
new one is one file, one line here, and its name and keys in the recipe.
"""

from __future__ import annotations

from types import ModuleType

from mcore_swift.peft import bottleneck, reft

BLOCK_METHODS: dict[str, ModuleType] = {"bottleneck": bottleneck, "reft": reft}
