"""What the layers of FLUX.1 and Chroma are called in LoRA files of sd-scripts, and in those of diffusers.

sd-scripts has the paths of the published single files, diffusers (and ai-toolkit, which writes the same) those of its
own classes, `FluxTransformer2DModel` and `ChromaTransformer2DModel`. Some layers of the one are several of the other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from library.files.weights import describe_keys
from networks.core.joining import join_parts, split_parts
from networks.core.key_names import dialect
from networks.core.lora_file import LoraFile, LowRankPair
from networks.core.tool_metadata import Family

logger = logging.getLogger(__name__)

BLOCKS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn_proj": ("attn.to_out.0",),
            "txt_attn_proj": ("attn.to_add_out",),
            "img_mlp_0": ("ff.net.0.proj",),
            "img_mlp_2": ("ff.net.2",),
            "txt_mlp_0": ("ff_context.net.0.proj",),
            "txt_mlp_2": ("ff_context.net.2",),
            "img_mod_lin": ("norm1.linear",),
            "txt_mod_lin": ("norm1_context.linear",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation_lin": ("norm.linear",),
        },
    ),
}
"""Our list of blocks -> diffusers' list, and within a block our layer -> diffusers' layers, top rows first."""

ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
}
"""The layers before the first block."""

_BFL = "https://github.com/black-forest-labs/flux"
FAMILIES = {
    "dev": Family("flux1", "flux-1-dev", _BFL, "1024x1024"),
    "schnell": Family("flux1", "flux-1-schnell", _BFL, "1024x1024"),
    "chroma": Family("chroma", "chroma", "https://huggingface.co/lodestones/Chroma", "1024x1024"),
}

FUSED = "linear1"
MLP_RATIO = 4
"""How much wider the hidden layer of an MLP is in every published model."""

_OURS = re.compile(r"^lora_unet_(double_blocks|single_blocks)_(\d+)_(.+)$")
_PREFIX = re.compile(r"^(transformer|diffusion_model|base_model\.model)\.")
_THEIRS = re.compile(r"^(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)$")
_OUR_CLIP = re.compile(r"^lora_te1_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(.+)$")
_THEIR_CLIP = re.compile(r"^text_encoder\.(?:text_model\.)?encoder\.layers\.(\d+)\.(self_attn|mlp)\.(.+)$")
_OUR_T5 = re.compile(r"^lora_te3_encoder_block_\d+_")


def is_flux_name(name: str) -> bool:
    """Whether sd-scripts' `name` of an adapter is one for FLUX.1 or Chroma."""
    match = _OURS.match(name)
    if match is not None:
        return match[3] in BLOCKS[match[1]][1]
    return name.removeprefix("lora_unet_") in ENDS or bool(_OUR_CLIP.match(name) or _OUR_T5.match(name))


def is_diffusers_layout(file: LoraFile) -> bool:
    """Whether names are paths of layers, as those of diffusers, ai-toolkit and PEFT, and not sd-scripts'."""
    return any(_PREFIX.match(name) or _THEIR_CLIP.match(name) for name in file.pairs)


def model_family(keys: Iterable[str], source: str) -> Family:
    """Which model a file with these keys holds.

    Raises:
        ValueError: it is in the layout of diffusers, or no FLUX.1 or Chroma at all.
    """
    keys = list(keys)
    if not any("double_blocks.0." in key for key in keys):
        if any(key.startswith("transformer_blocks.") for key in keys):
            raise ValueError(
                f"{source} is in the layout of diffusers; make one file of the published layout of it first, with "
                "tools/convert_diffusers_to_flux.py"
            )
        raise ValueError(f"{source}: no FLUX.1 and no Chroma, it has no double_blocks ({dialect(keys)})")
    if any("distilled_guidance_layer." in key for key in keys):
        return FAMILIES["chroma"]
    return FAMILIES["dev" if any("guidance_in." in key for key in keys) else "schnell"]


def lora_family(files: Sequence[LoraFile]) -> Family:
    """Which model LoRAs say that they were trained on; FLUX.1 dev if they do not say."""
    return next((family for file in files if (family := stated_family(file)) is not None), FAMILIES["dev"])


def stated_family(file: LoraFile) -> Family | None:
    """Which model a LoRA says that it was trained on."""
    architecture = file.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    version = file.metadata.get("ss_base_model_version")
    for family in FAMILIES.values():
        if architecture == family.architecture or (not architecture and version == family.base_version):
            return family
    return None


def check_names(file: LoraFile) -> None:
    """Refuse a LoRA in sd-scripts' layout that is for another family of models.

    Raises:
        ValueError: a name is not one of FLUX.1's or Chroma's; says what the file seems to be.
    """
    foreign = [name for name in file.pairs if not is_flux_name(name)]
    if foreign:
        raise ValueError(
            f"{file.path}: {len(foreign)} of {len(file.pairs)} layers are none of FLUX.1 or Chroma, such as "
            f"{describe_keys(foreign, 2)} ({dialect([f'{name}.lora_down.weight' for name in foreign])})"
        )


def to_diffusers(file: LoraFile) -> dict[str, LowRankPair]:
    """The adapters under diffusers' names, alpha being the rank; T5-XXL's are left out, since it cannot load them.

    Raises:
        ValueError: the file is for another family of models, or sizes do not fit.
    """
    check_names(file)
    converted: dict[str, LowRankPair] = {}
    lost = []
    for name, pair in file.pairs.items():
        block, clip = _OURS.match(name), _OUR_CLIP.match(name)
        if block is not None:
            their_blocks, layers = BLOCKS[block[1]]
            theirs = [f"transformer.{their_blocks}.{block[2]}.{layer}" for layer in layers[block[3]]]
            parts = split_parts(pair, _rows(file, name, len(theirs))) if len(theirs) > 1 else [pair]
            converted |= zip(theirs, map(without_alpha, parts), strict=True)
        elif clip is not None:
            converted[f"text_encoder.text_model.encoder.layers.{clip[1]}.{clip[2]}.{clip[3]}"] = without_alpha(pair)
        elif (end := name.removeprefix("lora_unet_")) in ENDS:
            converted[f"transformer.{ENDS[end]}"] = without_alpha(pair)
        else:
            lost.append(name)
    if lost:
        logger.warning(
            "%s: %d adapters of T5-XXL are left out, which diffusers cannot load: %s",
            file.path,
            len(lost),
            describe_keys(lost, 2),
        )
    return converted


def from_diffusers(file: LoraFile) -> dict[str, LowRankPair]:
    """The adapters under sd-scripts' names, alpha being the rank.

    Names may begin with `transformer.`, or as ComfyUI and PEFT write them, and may be paths of the published single
    files as well.

    Raises:
        ValueError: no name is one of diffusers', or the layers that become one do not fit together.
    """
    converted: dict[str, LowRankPair] = {}
    joined: dict[str, dict[str, LowRankPair]] = {}
    lost = []
    for name, pair in file.pairs.items():
        path = _PREFIX.sub("", name)
        block, clip = _THEIRS.match(path), _THEIR_CLIP.match(name)
        ours = f"lora_unet_{path.replace('.', '_')}"
        if block is not None and (layer := _FROM_THEIRS.get((block[1], block[3]))):
            joined.setdefault(f"lora_unet_{layer[0]}_{block[2]}_{layer[1]}", {})[block[3]] = pair
        elif clip is not None:
            layer_of_clip = f"lora_te1_text_model_encoder_layers_{clip[1]}_{clip[2]}_{clip[3]}"
            converted[layer_of_clip] = with_rank_as_alpha(pair)
        elif path in _END_OF_THEIRS:
            converted[f"lora_unet_{_END_OF_THEIRS[path]}"] = with_rank_as_alpha(pair)
        elif path != name and is_flux_name(ours):
            converted[ours] = with_rank_as_alpha(pair)
        else:
            lost.append(name)
    if not converted and not joined:
        hint = "it is in the layout of sd-scripts already" if any(map(is_flux_name, lost)) else "none is of diffusers"
        raise ValueError(f"{file.path}: no layer of FLUX.1 among its {len(lost)} names, such as {lost[0]}; {hint}")
    if lost:
        few = describe_keys(lost, 2)
        logger.warning("%s: %d adapters are left out, which sd-scripts has no name for: %s", file.path, len(lost), few)
    hidden = {_PREFIX.sub("", name): pair for name, pair in file.pairs.items()}
    for name, parts in joined.items():
        converted[name] = _joined(file.path, name, parts, hidden)
    return converted


def without_alpha(pair: LowRankPair) -> LowRankPair:
    """The same effect with alpha equal to the rank, the scale being shared between both matrices.

    Most of it goes to `down`, by powers of two, so that no precision is lost in half formats.
    """
    down_scale, up_scale = pair.scale, 1.0
    while down_scale * 2 < up_scale:
        down_scale, up_scale = down_scale * 2, up_scale / 2
    return LowRankPair(pair.down * down_scale, pair.up * up_scale, float(pair.rank))


def with_rank_as_alpha(pair: LowRankPair) -> LowRankPair:
    """The same effect with alpha equal to the rank."""
    return join_parts([pair], [pair.up.shape[0]])


_FROM_THEIRS = {
    (their_blocks, their_layer): (our_blocks, our_layer)
    for our_blocks, (their_blocks, layers) in BLOCKS.items()
    for our_layer, theirs in layers.items()
    for their_layer in theirs
}
_END_OF_THEIRS = {theirs: ours for ours, theirs in ENDS.items()}


def _rows(file: LoraFile, name: str, parts: int) -> list[int]:
    """How many rows of a joined layer belong to each of its parts, from the sizes in the file."""
    rows = file.pairs[name].up.shape[0]
    if not name.endswith(FUSED):
        if rows % parts:
            raise ValueError(f"{file.path}: {name} has {rows} rows, which are not {parts} equal parts")
        return [rows // parts] * parts
    width = _hidden_size(file, name, rows)
    return [width] * 3 + [rows - 3 * width]


def _hidden_size(file: LoraFile, name: str, rows: int) -> int:
    """The width of the model, from the first layer of a single block.

    That layer reads as many values as the model is wide and makes q, k, v and the MLP's hidden layer of them; the
    block's second layer reads what attention makes of the former, and the latter.
    """
    width = file.pairs[name].down.shape[1]
    second = file.pairs.get(f"{name.removesuffix(FUSED)}linear2")
    if 3 * width < rows and (second is None or second.down.shape[1] == rows - 2 * width):
        return width
    width, rest = divmod(rows, 3 + MLP_RATIO)
    if rest:
        raise ValueError(f"{file.path}: {name} has {rows} rows, which are not q, k, v and an MLP of any known model")
    return width


def _joined(
    source: str, name: str, parts: Mapping[str, LowRankPair], all_parts: Mapping[str, LowRankPair]
) -> LowRankPair:
    """One of our layers from those of diffusers' that the file has, the others without effect."""
    match = _OURS.match(name)
    assert match is not None
    their_blocks, layers = BLOCKS[match[1]]
    theirs = layers[match[3]]
    if len(theirs) == 1:
        return with_rank_as_alpha(parts[theirs[0]])
    widths = {part.down.shape[1] for part in parts.values()}
    if len(widths) > 1:
        raise ValueError(f"{source}: the parts of {name} read {sorted(widths)} values; they must read the same")
    width = next((parts[theirs[i]].up.shape[0] for i in range(3) if theirs[i] in parts), widths.pop())
    rows = [width] * 3
    if match[3] == FUSED:
        second = all_parts.get(f"{their_blocks}.{match[2]}.proj_out")
        mlp = parts.get(theirs[3])
        unknown = MLP_RATIO * width if second is None else second.down.shape[1] - width
        rows.append(unknown if mlp is None else mlp.up.shape[0])
    for part, count in zip(theirs, rows, strict=True):
        if part in parts and parts[part].up.shape[0] != count:
            raise ValueError(
                f"{source}: {part} of {their_blocks}.{match[2]} has {parts[part].up.shape[0]} rows, expected {count}"
            )
    return join_parts([parts.get(part) for part in theirs], rows)
