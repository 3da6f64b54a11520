"""The README's picture: the example scene, its mask, and what the demo model paints there.

Usage: python -m training.showcase [--output training/showcase.png]
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "service" / "api" / "playground" / "example"
MODEL = ROOT / "service" / "worker" / "models" / "demo"
PROMPTS = ("a red house", "a purple tree", "a yellow car", "nothing")
CAPTION_HEIGHT = 20


def main() -> None:
    """Paint and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("showcase.png"))
    output = parser.parse_args().output
    scene, mask = (Image.open(EXAMPLE / name).convert("RGB") for name in ("scene.png", "mask.png"))
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(MODEL)
    panels = [("image", scene), ("mask", mask)]
    for prompt in PROMPTS:
        generator = torch.Generator().manual_seed(1)
        painted = pipeline(
            prompt, image=scene, mask_image=mask, height=scene.height, width=scene.width,
            num_inference_steps=10, generator=generator,
        ).images[0]  # fmt: skip
        panels.append((f'"{prompt}"', Image.composite(painted, scene, mask.convert("L"))))
    sheet = Image.new("RGB", (len(panels) * scene.width, scene.height + CAPTION_HEIGHT), "white")
    for index, (caption, panel) in enumerate(panels):
        sheet.paste(panel, (index * scene.width, CAPTION_HEIGHT))
        ImageDraw.Draw(sheet).text((index * scene.width + 4, 4), caption, fill="black")
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    main()
