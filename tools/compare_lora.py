"""What did a LoRA for Stable Diffusion 1.x, 2.x or XL change? The same pictures without and with it, on one sheet.

python tools/compare_lora.py --pretrained_model_name_or_path MODEL --lora FILE --prompts FILE --output SHEET
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from library.flags.console import print_everything
from library.flags.model import ModelFlags
from library.flags.settings import Settings
from library.generation.images import contact_sheet, save_png, to_image
from library.generation.picture_latents import picture_latents
from library.generation.prompt_line import read_prompts
from library.models.architecture import Architecture, ImageRequest
from library.models.sd.architecture import StableDiffusion
from library.models.sdxl.architecture import Sdxl
from networks.lora import create_network_from_weights


def main(words: Sequence[str] | None = None) -> int:
    """Make the sheet; 1 and one line on the error stream if the user's files do not fit."""
    arguments = read_arguments(words)
    try:
        compare(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print_everything()
    print(arguments.output)
    return 0


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="the model the LoRA was trained on")
    parser.add_argument("--lora", required=True, type=Path, help="the LoRA, a .safetensors file")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts as in --sample_prompts")
    parser.add_argument("--output", required=True, type=Path, help="the sheet to write, a .png file")
    parser.add_argument("--multiplier", type=float, default=1.0, help="strength of the LoRA")
    parser.add_argument("--tokenizer_cache_dir", help="where tokenizers lie")
    parser.add_argument("--v2", action="store_true", help="the model is Stable Diffusion 2.x")
    parser.add_argument("--sdxl", action="store_true", help="the model is Stable Diffusion XL")
    parser.add_argument("--v_parameterization", action="store_true", help="the model predicts v")
    arguments = parser.parse_args(words)
    if arguments.sdxl and arguments.v2:
        parser.error("--sdxl and --v2 are different models; keep one")
    return arguments


@torch.no_grad()
def compare(arguments: argparse.Namespace) -> None:
    """Make every picture with the base model, apply the LoRA, make them again, write the sheet.

    Raises ValueError or OSError if a file is missing or does not fit the model.
    """
    family = Sdxl if arguments.sdxl else StableDiffusion
    arch = family(
        Settings.of(
            ModelFlags(
                pretrained_model_name_or_path=arguments.pretrained_model_name_or_path,
                v2=arguments.v2,
                v_parameterization=arguments.v_parameterization,
                tokenizer_cache_dir=arguments.tokenizer_cache_dir,
            )
        )
    )
    requests = [arch.complete_request(request) for request in read_prompts(arguments.prompts)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    encoders = arch.load_text_encoders(dtype, device)
    denoiser = arch.load_denoiser(dtype, device)
    vae = arch.load_vae(torch.float32, device)

    def pictures() -> list[Image.Image]:
        return [picture(arch, encoders, denoiser, vae, request) for request in requests]

    without = pictures()
    views = arch.network_views(encoders)
    network, _ = create_network_from_weights(
        arguments.multiplier, str(arguments.lora), vae, views, denoiser, for_inference=True
    )
    network.apply_to(views, denoiser)
    network.load_weights(str(arguments.lora))
    network.to(device, dtype).eval()
    images = [image for pair in zip(without, pictures(), strict=True) for image in pair]
    labels = [f"{when}: {request.prompt}" for request in requests for when in ("without", "with")]
    save_png(contact_sheet(images, labels, columns=2), arguments.output)


def picture(
    arch: Architecture,
    encoders: Sequence[torch.nn.Module],
    denoiser: torch.nn.Module,
    vae: torch.nn.Module,
    request: ImageRequest,
) -> Image.Image:
    """One picture, as `request` says."""
    text = arch.encode_prompts(encoders, [request.prompt, request.negative_prompt])
    latents = picture_latents(arch, denoiser, text, request, next(denoiser.parameters()).device)
    return to_image(arch.decode_latents(vae, latents.float())[0])


if __name__ == "__main__":
    sys.exit(main())
