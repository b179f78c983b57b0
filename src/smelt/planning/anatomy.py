"""What each tensor of a checkpoint is, from names, shapes and config alone: there is no list of architectures.

The rules, and what they were derived from, are written down in docs/design/anatomy.md.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smelt.errors import InputError, SmeltError
from smelt.specs import TensorSpec

KeyPath = tuple[str, ...]
"""The keys that lead to a value inside config.json, from the outside in."""


class Role(enum.Enum):
    """What a tensor is for."""

    LAYER = "layer"
    """In a numbered layer of a stack."""
    EMBEDDING = "embedding"
    """One row per token, at the input."""
    HEAD = "head"
    """One row per token, at the output (the weight, and a bias that belongs to it)."""
    BEFORE = "before"
    """Outside every stack, acting before the main one: positions, patches, a vision tower's own ends."""
    AFTER = "after"
    """Outside every stack, acting after the main one: final norm, pooler, classifier."""
    BUFFER = "buffer"
    """Not a parameter: a rotary frequency, a causal mask, the position numbers. It may lie in a layer."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor: `stack` is the prefix before the layer number, `suffix` what follows it (or the full name)."""

    role: Role
    stack: str | None
    layer: int | None
    suffix: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A whole checkpoint.

    `stacks` gives each stack's number of layers, `main` the one that a recipe's layer ranges mean (None when that is
    ambiguous: encoder and decoder), `extra_layers` how many layers at its end predict further tokens and are not
    counted by the config. `layer_count_keys` are the places in the config that hold its length. `tied`: the output
    head is the input embedding, and not on disk. `broken` gives what would be stacks but for absent numbers.
    """

    parts: dict[str, Part]
    stacks: dict[str, int]
    main: str | None
    embedding: str | None
    head: str | None
    tied: bool
    layer_count_keys: tuple[KeyPath, ...] = ()
    extra_layers: int = 0
    broken: dict[str, tuple[int, ...]] = field(default_factory=dict)


def anatomy(tensors: Mapping[str, TensorSpec], config: Mapping[str, object] | None) -> Anatomy:
    """Say what every tensor is; `config` is the checkpoint's config.json, if it has one."""
    config = config or {}
    places, stacks, broken = _stacks(tensors)
    outside = {name: spec for name, spec in tensors.items() if places[name] is None}
    vocabulary = {size for _, node in _language(config) if (size := _integer(node.get("vocab_size")))}
    embedding = _embedding(outside, vocabulary)
    head = _head(outside, vocabulary, embedding)
    main = _main(stacks, config, embedding)
    length = stacks[main] if main is not None else 0
    counts = _counts(config)
    extra = _predict_layers(config)
    if length in counts.values() or length - extra not in counts.values():
        extra = 0

    sizes = {tensors[name].shape[0] for name in (embedding, head) if name is not None}
    parts = {}
    for name, spec in tensors.items():
        place = places[name]
        if place is not None:
            stack, layer, suffix = place
            role = Role.BUFFER if _is_buffer(spec) else Role.LAYER
            parts[name] = Part(role, stack, layer, suffix, _expert(suffix))
        else:
            role = _role(spec, embedding, head, sizes, main)
            parts[name] = Part(role, None, None, name, _expert(name))
    return Anatomy(
        parts=parts,
        stacks=stacks,
        main=main,
        embedding=embedding,
        head=head,
        tied=embedding is not None and head is None and _declared_tied(config),
        layer_count_keys=_count_keys(counts, length - extra, main) if main is not None else (),
        extra_layers=extra,
        broken=broken,
    )


def check(anatomy: Anatomy, config: Mapping[str, object] | None, name: str) -> list[SmeltError]:
    """What contradicts itself in the checkpoint `name`: a config that counts other layers than the files have.

    Models without a token embedding are not judged: convolutional networks count otherwise.
    """
    config = config or {}
    judged = [anatomy.main] if anatomy.main is not None else _encoder_decoder(anatomy.stacks)
    counts = _counts(config) if anatomy.main is not None else _counts(config, everywhere=True)
    if not counts or anatomy.embedding is None:
        return []
    allowed = set(counts.values()) | {count + _predict_layers(config) for count in counts.values()}
    shared = _integer(config.get("num_hidden_groups"))  # layers that share one set of weights
    if shared is not None:
        allowed.add(shared)
    wrong = [stack for stack in judged if anatomy.stacks[stack] not in allowed]
    # A gap matters where no stack of the right length stands as near to the embedding.
    fitting = [stack for stack, length in anatomy.stacks.items() if length in allowed]
    nearest = max((_shared(stack, anatomy.embedding) for stack in fitting), default=-1)
    gaps = {
        stack: numbers
        for stack, numbers in anatomy.broken.items()
        if _shared(stack, anatomy.embedding) > nearest and numbers[-1] < 2 * max(allowed)
    }
    if not wrong and not gaps:
        return []

    said = " or ".join(str(count) for count in dict.fromkeys(counts.values()))
    where = [f"config.json  {'.'.join(path)}: {count}" for path, count in counts.items()]
    fix = f"give {name} the config.json that belongs to these files, or the files that are missing"
    if gaps:
        stack, numbers = max(gaps.items(), key=lambda item: len(item[1]))
        absent = sorted(set(range(max(*allowed, numbers[-1] + 1))) - set(numbers))
        message = f"model {name} has a gap in its layers: config.json says {said}, the files have {len(numbers)}"
        where.append(f"files        {stack}.N without N = {_listed(absent)}")
        return [InputError(message, where=where, fix=fix)]
    return [
        InputError(
            f"model {name}: config.json says {said} layers, the files have {anatomy.stacks[stack]}",
            where=[*where, f"files        {stack}.0 to {stack}.{anatomy.stacks[stack] - 1}"],
            fix=fix,
        )
        for stack in wrong
    ]


def layer_lists(config: Mapping[str, object], count: int, *, beside: KeyPath | None = None) -> tuple[KeyPath, ...]:
    """Where the config holds one value per layer: sequences as long as the layer count they stand beside.

    They must be cut, joined and repeated as the layers are. A string counts when its name says pattern. `beside` is the
    place of a layer count outside the language model's part: of a vision tower.
    """
    return tuple(
        (*path, key)
        for path, key, value in _beside(config, count, beside)
        if len(value) == count
        and (isinstance(value, list) or "pattern" in key)
        and not _NOT_PER_LAYER.search(key)
        and not _are_numbers(key, value, count)
    )


def layer_numbers(config: Mapping[str, object], count: int, *, beside: KeyPath | None = None) -> tuple[KeyPath, ...]:
    """Where the config lists numbers of layers (`mlp_only_layers: [0, 3]`): they must be renumbered, not cut."""
    found = _beside(config, count, beside)
    return tuple((*path, key) for path, key, value in found if _are_numbers(key, value, count))


# --- stacks -------------------------------------------------------------------------------------------------

Place = tuple[str, int, str]
"""Stack, layer number, suffix."""


def _stacks(
    names: Mapping[str, TensorSpec],
) -> tuple[dict[str, Place | None], dict[str, int], dict[str, tuple[int, ...]]]:
    """Each name's place in a stack, if any; the stacks' lengths; the numbers present in stacks with a gap."""
    numbered = {name: list(_numbers(name)) for name in names}
    members: dict[str, dict[int, bool]] = {}  # prefix -> number -> has child modules
    for found in numbered.values():
        for prefix, number, suffix in found:
            numbers = members.setdefault(prefix, {})
            numbers[number] = numbers.get(number, False) or "." in suffix
    lengths, gaps = {}, {}
    for prefix, numbers in members.items():
        if all(numbers.values()) and not prefix.endswith("experts"):
            if max(numbers) == len(numbers) - 1:
                lengths[prefix] = len(numbers)
            else:
                gaps[prefix] = tuple(sorted(numbers))

    places: dict[str, Place | None] = {}
    stacks: dict[str, int] = {}
    broken: dict[str, tuple[int, ...]] = {}
    for name, found in numbered.items():
        places[name] = None
        for place in found:  # from the outside in: the outermost stack counts
            if place[0] in lengths:
                places[name] = place
                stacks.setdefault(place[0], lengths[place[0]])
                break
            if place[0] in gaps:  # what lies inside a damaged stack must not pass for a stack
                broken.setdefault(place[0], gaps[place[0]])
                break
    return places, stacks, broken


def _numbers(name: str) -> Iterator[Place]:
    """Every integer component of a dotted name that has something before and after it."""
    for match in _NUMBER.finditer(name):
        yield name[: match.start()], int(match[1]), name[match.end() + 1 :]


_NUMBER = re.compile(r"(?<=.)\.(0|[1-9][0-9]{0,5})(?=\..)", re.DOTALL)


def _expert(suffix: str) -> int | None:
    if "expert" not in suffix:
        return None
    found = _EXPERT.search(suffix)
    return int(found[1]) if found else None


_EXPERT = re.compile(r"(?:^|\.)experts\.(?:expert_)?([0-9]{1,6})\.")


def _main(stacks: Mapping[str, int], config: Mapping[str, object], embedding: str | None) -> str | None:
    """The stack that layer ranges mean: as long as the config says, nearest the embedding, longest; or None."""
    left = list(stacks)
    if len(left) > 1 and (_encoder_decoder(stacks) or config.get("is_encoder_decoder") is True):
        return None
    counts = set(_counts(config).values())
    extra = _predict_layers(config)
    exact = [stack for stack in left if stacks[stack] in counts or stacks[stack] - extra in counts]
    left = exact or left
    if embedding is not None and left:
        # A vision tower may be longer; the language model is the one whose name begins as the embedding's does.
        nearness = {stack: _shared(stack, embedding) for stack in left}
        left = [stack for stack in left if nearness[stack] == max(nearness.values())]
    left = [stack for stack in left if stacks[stack] == max(stacks[other] for other in left)]
    return left[0] if len(left) == 1 else None


def _shared(one: str, other: str) -> int:
    """How many leading components two dotted names share."""
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count


def _encoder_decoder(stacks: Mapping[str, int]) -> tuple[str, ...]:
    """Two stacks whose names differ only in saying encoder and decoder, or ()."""
    for stack in stacks:
        components = stack.split(".")
        if "encoder" in components and not _TOWER.search(stack):
            twin = ".".join("decoder" if word == "encoder" else word for word in components)
            if twin in stacks:
                return stack, twin
    return ()


# --- what lies outside the stacks ---------------------------------------------------------------------------

# The module's own name, in the order of preference.
_TOKENS = re.compile(
    r"shared|embed_tokens|wte|input_embeddings?|word_embeddings?|tok(?:en)?s?_embed(?:ding)?s?|embed_in|embed(?:ding)?s?"
)
_OUTPUT = re.compile(r"(?:.*_)?(?:head|output|out|loss)|output_layer|decoder|unembed(?:ding|_tokens)?")
_SURE_OUTPUT = re.compile(r"(?:.*_)?lm_head|embed_out")
_HEAD_BIAS = re.compile(r"head|predictions|output|decoder")
_TOWER = re.compile(
    r"vision|visual|image|video|audio|speech|multi_?modal|(?:^|[._])mm_|projector|merger|connector|resampler"
    r"|perceiver|aligner"
)
_NOT_TOKENS = re.compile(rf"position|pos_|wpe|type|segment|patch|time|per_layer|{_TOWER.pattern}")
_BEFORE = re.compile(
    r"(?:^|[._])emb|position|wte|wpe|patch|pos_|token_type|(?:cls|mask|register|class)_?(?:token|embed)"
    r"|per_layer|(?:^|\.)shared\.|(?:^|\.)conv[0-9]*\."
)


def _module(name: str) -> str:
    """The last component of the module that owns the tensor `name`."""
    components = name.split(".")
    if components[-1] in ("weight", "bias") and len(components) > 1:
        return components[-2]
    return components[-1]


def _embedding(outside: Mapping[str, TensorSpec], vocabulary: set[int]) -> str | None:
    """The input embedding of tokens: by its name, its first dimension being the vocabulary where that is known."""
    found = [
        name
        for name, spec in outside.items()
        if len(spec.shape) == 2 and not _NOT_TOKENS.search(name) and _TOKENS.fullmatch(_module(name))
    ]
    if not found:  # an unusual name: the one matrix of vocabulary rows that is no head
        found = [
            name
            for name, spec in outside.items()
            if len(spec.shape) == 2 and spec.shape[0] in vocabulary and not _OUTPUT.fullmatch(_module(name))
        ]
        found = found if len(found) == 1 else []

    def preference(name: str) -> tuple[bool, bool, int, int, str]:
        rows = outside[name].shape[0]
        return rows not in vocabulary, _module(name) != "shared", -rows, name.count("."), name

    return min(found, key=preference, default=None)


def _head(outside: Mapping[str, TensorSpec], vocabulary: set[int], embedding: str | None) -> str | None:
    """The output head: a matrix with the vocabulary's rows that is named as an output, or is the only one left."""
    rows = vocabulary | ({outside[embedding].shape[0]} if embedding is not None else set())
    matrices = [name for name, spec in outside.items() if len(spec.shape) == 2 and name != embedding]
    for pattern, any_size in ((_SURE_OUTPUT, True), (_OUTPUT, False)):
        found = [
            name
            for name in matrices
            if pattern.fullmatch(_module(name)) and (any_size or outside[name].shape[0] in rows)
        ]
        if found:
            return min(found, key=lambda name: (name.count("."), name))
    width = outside[embedding].shape[1] if embedding is not None else None
    left = [
        name
        for name in matrices
        if outside[name].shape[0] in rows - {width} and not _BEFORE.search(name) and not _TOWER.search(name)
    ]
    return left[0] if len(left) == 1 else None


def _role(spec: TensorSpec, embedding: str | None, head: str | None, vocabulary: set[int], main: str | None) -> Role:
    """The role of a tensor outside every stack; `vocabulary` holds the row counts of embedding and head."""
    name = spec.name
    if _is_buffer(spec):
        return Role.BUFFER
    if name == embedding:
        return Role.EMBEDDING
    if name == head:
        return Role.HEAD
    rows = spec.shape[0] if spec.shape else None
    if rows in vocabulary:
        if len(spec.shape) == 2 and not _NOT_TOKENS.search(name) and _TOKENS.fullmatch(_module(name)):
            return Role.EMBEDDING  # the same table once more, as in old T5 checkpoints
        if len(spec.shape) == 1 and name.endswith("bias") and _HEAD_BIAS.search(name) and "norm" not in name.lower():
            owner = name.rpartition(".")[0]
            if head == f"{owner}.weight" or name.endswith("predictions.bias") or _OUTPUT.fullmatch(_module(name)):
                return Role.HEAD
    tower = _TOWER.search(name) is not None and not (main is not None and _TOWER.search(main))
    return Role.BEFORE if tower or _BEFORE.search(name) else Role.AFTER


def _is_buffer(spec: TensorSpec) -> bool:
    """Known buffers of old checkpoints. A causal mask is 4-D [1, 1, n, n]; a bias that is a parameter never is."""
    name, shape = spec.name, spec.shape
    if name.endswith(".bias") or name == "bias":
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return name.endswith(_BUFFERS) or name.rpartition(".")[2] in ("position_ids", "token_type_ids")


_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.masked_bias",
    "attention.masked_bias",
)


_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.masked_bias",
    "attention.masked_bias",
)


# --- the config ---------------------------------------------------------------------------------------------

_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "layers",
    "depth",
)
_PREDICT_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
_LANGUAGE = re.compile(r"text|language|llm|(?:^|_)lm(?:_|$)|decoder|thinker")
_OTHER = re.compile(r"vision|visual|image|audio|speech|talker|encoder|code|depth")
_GENERATES = re.compile(r"LM$|LMHead|ForConditionalGeneration|ForPreTraining|ForSpeechSeq2Seq|DoubleHeads")
_LAYER_WORDS = re.compile(r"layer|block|idx|index|indices")
_NOT_PER_LAYER = re.compile(r"architectures|token|label|languages|limit|range|betas|section|_ids$|axes")


def _language(config: Mapping[str, object], *, everywhere: bool = False) -> list[tuple[KeyPath, Mapping[str, object]]]:
    """The parts of a config that describe the language model: the outermost one, then `text_config` and its like.

    `everywhere`: every nested part, those of a vision tower too.
    """
    found: list[tuple[KeyPath, Mapping[str, object]]] = [((), config)]
    for path, node in found:
        for key, value in node.items():
            wanted = everywhere or (_LANGUAGE.search(key) and not _OTHER.search(key))
            if isinstance(value, Mapping) and wanted and len(path) < 4:
                found.append(((*path, key), value))
    return found


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _counts(config: Mapping[str, object], *, everywhere: bool = False) -> dict[KeyPath, int]:
    """Every place where the config counts the language model's layers (`everywhere`: or any other layers)."""
    return {
        (*path, key): count
        for path, node in _language(config, everywhere=everywhere)
        for key in _COUNT_KEYS
        if (count := _integer(node.get(key))) is not None
    }


def _count_keys(counts: Mapping[KeyPath, int], length: int, main: str) -> tuple[KeyPath, ...]:
    """The places that count the main stack; an encoder's stack is not counted by `decoder_layers`, nor vice versa."""
    other = {"encoder": "decoder", "decoder": "encoder"}
    foreign = [other[word] for word in main.split(".") if word in other]
    return tuple(
        path
        for path, count in counts.items()
        if count == length and not any(re.search(rf"(?:^|_){word}_layers", path[-1]) for word in foreign)
    )


def other_count_keys(config: Mapping[str, object], stack: str, length: int) -> tuple[KeyPath, ...]:
    """Where the config counts the layers of a stack that is not the main one: a vision tower, an encoder."""
    found: list[KeyPath] = []
    nodes: list[tuple[KeyPath, Mapping[str, object]]] = [((), config)]
    for path, node in nodes:
        for key, value in node.items():
            if isinstance(value, Mapping) and len(path) < 4:
                nodes.append(((*path, key), value))
            elif key in _COUNT_KEYS and _integer(value) == length:
                found.append((*path, key))
    tower = bool(_TOWER.search(stack))
    found = [path for path in found if tower == bool(_TOWER.search(".".join(path[:-1])))]
    decoder = [path for path in found if "decoder" in path[-1]]
    if "decoder" in stack.split(".") and decoder:
        return tuple(decoder)
    return tuple(path for path in found if path not in decoder) if "encoder" in stack.split(".") else tuple(found)


def _predict_layers(config: Mapping[str, object]) -> int:
    """How many layers beyond the counted ones predict further tokens (multi-token prediction)."""
    values = (_integer(node.get(key)) for _, node in _language(config) for key in _PREDICT_KEYS)
    return next((value for value in values if value is not None), 0)


def _declared_tied(config: Mapping[str, object]) -> bool:
    """Whether the config ties the head to the embedding: any `true` does; silence does for a model that writes text."""
    words = [node["tie_word_embeddings"] for _, node in _language(config) if "tie_word_embeddings" in node]
    if any(isinstance(word, bool) for word in words):
        return True in words
    architectures = config.get("architectures")
    if isinstance(architectures, Sequence) and not isinstance(architectures, str) and architectures:
        return any(isinstance(name, str) and _GENERATES.search(name) for name in architectures)
    return True


def _beside(
    config: Mapping[str, object], count: int, beside: KeyPath | None
) -> Iterator[tuple[KeyPath, str, list[object] | str]]:
    """The sequences beside a layer count of this value; without any count, those named after layers or blocks."""
    nodes = _language(config)
    if beside is not None:
        place: Any = config
        for key in beside[:-1]:
            place = place[key]
        nodes = [(beside[:-1], place)]
    for path, node in nodes:
        counts = [size for key in _COUNT_KEYS if (size := _integer(node.get(key))) is not None]
        for key, value in node.items():
            if isinstance(value, list | str) and (count in counts or (not counts and _LAYER_WORDS.search(key))):
                yield path, key, value


def _are_numbers(key: str, value: list[object] | str, count: int) -> bool:
    """Whether a list holds layer numbers: rising integers below `count`, under a name that says so."""
    if isinstance(value, str) or not value or not _LAYER_WORDS.search(key):
        return False
    numbers = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
    rising = numbers == sorted(set(numbers))
    per_layer = len(value) == count and numbers != list(range(count))
    return len(numbers) == len(value) and rising and numbers[0] >= 0 and numbers[-1] < count and not per_layer


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"{shown}, … ({len(numbers)} in all)" if len(numbers) > 8 else shown
