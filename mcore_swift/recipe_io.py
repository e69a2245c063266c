"""Recipe files: YAML and dotted overrides in, one frozen `Recipe` or one clear message out.

YAML is read a little more strictly, and a little more kindly, than PyYAML does by itself: a key that appears twice is
an error, `2e-4` is a number as in YAML 1.2, and a date is text. Types are checked by pydantic on the dataclasses of
`recipe.py`; this module turns its errors into the user's terms: file and line, key, what was found, what is allowed.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.constructor import ConstructorError

from mcore_swift.errors import InputError, nearest
from mcore_swift.recipe import Recipe, SourceSection

Location = tuple[str | int, ...]  # a place in a recipe: ("schedule", "steps"), ("data", "train", 0, "weight")

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ConstructorError(None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark)
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag != _TIMESTAMP]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


@dataclass(frozen=True)
class _Origin:
    """Where each value of a recipe came from, for messages."""

    file: Path
    node: yaml.Node | None  # the file's YAML tree, which knows the lines
    overrides: tuple[str, ...]  # dotted keys given on the command line

    def of(self, location: Location) -> str:
        dotted = _dotted(location)
        for key in self.overrides:
            if f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}."):
                return "command line"
        line = _line(self.node, location)
        return f"{self.file}:{line}" if line else str(self.file)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are command-line words: `--section.key VALUE` or `--section.key=VALUE`.

    VALUE is read as YAML; the last override of a key wins. Relative paths of models and data are looked for in the
    current directory, then in the recipe's folder. Raises InputError with one line for each thing that is wrong;
    contradictions between keys are left to `check_recipe`, missing model and data files to `check_files`.
    """
    data, node = _read_yaml(path)
    pairs = list(_parse_overrides(overrides))
    for key, value in pairs:
        _set(data, key, value)
    origin = _Origin(path, node, tuple(key for key, _ in pairs))
    try:
        text = json.dumps(_normalize(data))
    except (TypeError, ValueError) as error:  # !!binary, !!set, an alias to itself
        raise InputError(f"{path}: a recipe holds text, numbers, lists and mappings only ({error})") from None
    try:
        # As JSON, because there strict means what a recipe needs: an int is a float, but true and "2" are no ints.
        recipe = TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        raise InputError("\n".join(_message(e, origin) for e in error.errors())) from None
    return _resolve_paths(recipe, path.parent)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML with every key; `load_recipe` reads it back to an equal recipe."""
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_help() -> str:
    """Returns every key with its default, type and meaning, laid out as a recipe."""
    lines = []
    for section, hint in get_type_hints(Recipe).items():
        if not is_dataclass(hint):
            continue
        lines.append(f"{section}:  # {_documentation(Recipe)[section]}")
        hints, documentation = get_type_hints(hint), _documentation(hint)
        for field in fields(hint):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            shown = "" if default is MISSING else f" {json.dumps(default)}"
            required = ", required" if default is MISSING else ""
            kind = _describe(hints[field.name])
            lines.append(f"  {field.name}:{shown}  # {documentation[field.name]} [{kind}{required}]")
    return "\n".join(lines) + "\n"


def check_files(recipe: Recipe) -> None:
    """Raises InputError when a model, tokenizer, template or data file that the recipe names is not there."""
    named = [("model.path", recipe.model.path), ("model.tokenizer", recipe.model.tokenizer)]
    named += [("adapter.path", recipe.adapter.path), ("data.chat_template", recipe.data.chat_template)]
    named += [(f"adapter.several.{name}.path", one.path) for name, one in recipe.adapter.several.items()]
    named += [(f"objective.{key}", getattr(recipe.objective, key)) for key in ("reference_path", "teacher")]
    if recipe.data.format != "synthetic":
        named += [("data.train", source.path) for source in recipe.data.train]
    named += [("data.validation", source.path) for source in recipe.data.validation]
    for key, path in named:
        if path is not None and not _exists(Path(path)):
            looked = (
                "" if Path(path).is_absolute() else f" in the current directory ({Path.cwd()}) or beside the recipe"
            )
            raise InputError(f"{key}: no such file or folder: {path}{looked}")


def _read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"{path}: the recipe can't be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML text file: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: found {_found(data)}; a recipe is a mapping of sections: {_keys(Recipe)}")
    return {key: {} if section is None else section for key, section in data.items()}, node


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = iter(words)
    for word in rest:
        if not re.match(r"--\w+\.", word):
            raise InputError(f"command line: found {word!r}; expected --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise InputError(f"command line: --{key} needs a value")
        try:
            yield key, yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", error)
            raise InputError(f"command line: --{key}: {value!r} is not valid YAML ({problem}); quote it") from None


def _set(data: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    place = data
    for depth, part in enumerate(parents):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError(f"command line: --{key}: {'.'.join(parents[: depth + 1])} holds {_found(place)}, no keys")
    place[last] = value


def _normalize(data: dict[str, Any]) -> dict[str, Any]:
    """Spells out the short forms of data sources: `a.jsonl`, `[a.jsonl, {path: b.jsonl, weight: 2}]`."""
    section = data.get("data")
    if not isinstance(section, dict):
        return data
    short = {key: section[key] for key in ("train", "validation") if key in section}
    for key, value in short.items():
        sources = [value] if isinstance(value, str | dict) else value
        if isinstance(sources, list):
            sources = [{"path": source} if isinstance(source, str) else source for source in sources]
        short[key] = sources
    return {**data, "data": {**section, **short}}


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    def found(path: str) -> str:
        here = Path(path).expanduser()
        return str(folder / here if not _exists(here) and _exists(folder / here) else here) if path else path

    def home(path: str) -> str:
        return str(Path(path).expanduser()) if path else path

    return with_paths(recipe, read=found, written=home)


def with_paths(recipe: Recipe, *, read: Callable[[str], str], written: Callable[[str], str]) -> Recipe:
    """The recipe with each path in it replaced: by `read` what is read, by `written` what is (also) written to."""

    def optional(path: str | None, change: Callable[[str], str] = read) -> str | None:
        return None if path is None else change(path)

    def sources(listed: list[SourceSection]) -> list[SourceSection]:
        return [replace(source, path=read(source.path)) for source in listed]

    model, adapter, data, checkpoint = recipe.model, recipe.adapter, recipe.data, recipe.checkpoint
    objective = recipe.objective
    several = {name: replace(one, path=optional(one.path)) for name, one in adapter.several.items()}
    return replace(
        recipe,
        model=replace(model, path=read(model.path), tokenizer=optional(model.tokenizer)),
        adapter=replace(adapter, path=optional(adapter.path), several=several),
        objective=replace(
            objective, reference_path=optional(objective.reference_path), teacher=optional(objective.teacher)
        ),
        data=replace(
            data,
            train=data.train if data.format == "synthetic" else sources(data.train),
            validation=sources(data.validation),
            chat_template=optional(data.chat_template),
            cache_dir=optional(data.cache_dir, written),
        ),
        checkpoint=replace(checkpoint, dir=optional(checkpoint.dir, written)),
    )


def _exists(path: Path) -> bool:
    return path.exists() or Path(f"{path}.idx").exists()  # an indexed data set is named by its prefix


def _message(error: Any, origin: _Origin) -> str:
    """One pydantic error (`ValidationError.errors()` row) in the user's terms."""
    location, found = error["loc"], error["input"]
    where = f"{origin.of(location)}: {_dotted(location)}"
    if error["type"] == "unexpected_keyword_argument":
        section, name = _hint(location[:-1]), str(location[-1])
        inside = f" in {_dotted(location[:-1])}" if len(location) > 1 else ""
        return f"{where}: unknown key.{_suggest(name, section)} Allowed{inside}: {_keys(section)}"
    if error["type"] == "missing":
        return f"{where} is missing: {_documentation(_hint(location[:-1]))[str(location[-1])]}"
    hint = _hint(location)
    choices = [str(value) for value in _literals(hint)]
    near = nearest(found, choices) if isinstance(found, str) else ""
    return f"{where}: found {_found(found)}; allowed: {_describe(hint)}.{near}"


def _suggest(name: str, section: Any) -> str:
    """ " Did you mean …?" from the section's own keys, or from the section that a key belongs to."""
    sections = {key: hint for key, hint in get_type_hints(Recipe).items() if is_dataclass(hint)}
    homes = [f"{key}.{name}" for key, hint in sections.items() if name in {f.name for f in fields(hint)}]
    return f" Did you mean {homes[0]!r}?" if homes else nearest(name, [f.name for f in fields(section)])


def _dotted(location: Location) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _line(node: yaml.Node | None, location: Location) -> int | None:
    """The line, from 1, of the deepest part of `location` that the file has."""
    line: int | None = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            item: yaml.Node = node.value[part]
            line, node = item.start_mark.line + 1, item
    return line


def _hint(location: Location) -> Any:
    """The declared type of the value at `location`."""
    hint: Any = Recipe
    for part in location:
        hint = get_type_hints(hint)[str(part)] if is_dataclass(hint) else get_args(hint)[-1]
    return hint


def _literals(hint: Any) -> tuple[object, ...]:
    """The values that a `Literal[…]`, or a `Literal[…] | None`, allows; () for other types."""
    return get_args(hint) if get_origin(hint) is Literal else sum(map(_literals, _alternatives(hint)), ())


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if type(None) in get_args(hint) else ()


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    SourceSection: "a path or {path, weight}",
}


def _describe(hint: Any) -> str:
    if alternatives := _alternatives(hint):
        return " or ".join(_describe(each) for each in alternatives)
    if get_origin(hint) is Literal:
        return ", ".join(str(value) for value in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {_describe(get_args(hint)[0])}"
    return _NAMES.get(hint, "a mapping")


def _found(value: object) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return json.dumps(value, default=str)[:80]


def _keys(section: Any) -> str:
    return ", ".join(field.name for field in fields(section))


def _documentation(section: Any) -> dict[str, str]:
    """The comment on each field's line."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), flags=re.MULTILINE))
