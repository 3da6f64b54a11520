"""Resizing, cropping and overlay are diffusers' own, bit for bit, without its dependencies."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.fitting import Fitted, fit, overlay
from service.request import InpaintRequest
from service.settings import Settings
from service.worker.checkpoint import load
from service.worker.pipeline import InpaintPipeline
from tests.model.mixed_requests import mixed_requests
from tests.model.staggered import run_staggered
from tests.model.stock import Stock

Pixels = NDArray[np.uint8]

NATIVE_SIZE = 128
SIDES = st.one_of(st.integers(1, 60), st.integers(1, 420))
NAMED_SIDES = st.sampled_from([64, 96, 128, 200, 256])
WORKING_SIDES = st.none() | NAMED_SIDES

# As `StableDiffusionInpaintPipeline.__init__` makes them.
IMAGE_PROCESSOR = VaeImageProcessor(vae_scale_factor=8)
MASK_PROCESSOR = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


def noise(seed: int, *shape: int) -> Pixels:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@st.composite
def masks(draw: st.DrawFn) -> Pixels:
    """Masks with a grey or white box, ellipse or scattered pixels."""
    height, width, seed = draw(SIDES), draw(SIDES), draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["box", "ellipse", "noise", "dots"]))
    if kind == "noise":
        return noise(seed, height, width)
    if kind == "dots":
        return np.where(noise(seed, height, width) > 250, noise(seed + 1, height, width), 0).astype(np.uint8)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    rows, columns = np.mgrid[0:height, 0:width]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    if kind == "ellipse":
        down, across = (rows - (top + bottom) / 2) / (bottom - top), (columns - (left + right) / 2) / (right - left)
        inside &= down**2 + across**2 <= 0.25
    return np.where(inside, draw(st.sampled_from([255, 255, 130, 60])), 0).astype(np.uint8)


def fitted(image: Pixels, mask: Pixels, height: int | None, width: int | None, padding: int | None) -> Fitted:
    """Fit as for a model of `NATIVE_SIZE`."""
    return fit(
        image,
        mask,
        native_size=NATIVE_SIZE,
        size_multiple=8,
        height=height,
        width=width,
        padding_mask_crop=padding,
    )


def assert_same_input(result: Fitted, image: torch.Tensor, mask: torch.Tensor) -> None:
    """The fitted arrays are what stock's preprocessing gives, the mask once binarised as stock does."""
    ours = 2.0 * VaeImageProcessor.numpy_to_pt(result.image.astype(np.float32)[None] / 255.0) - 1.0
    assert torch.equal(ours, image)
    assert np.array_equal(result.mask >= 128, mask[0, 0].numpy() == 1)


@settings(max_examples=150)
@given(mask=masks(), height=WORKING_SIDES, width=WORKING_SIDES, padding=st.integers(0, 90))
def test_padded_crop_and_overlay_are_stocks(mask: Pixels, height: int | None, width: int | None, padding: int) -> None:
    """`padding_mask_crop`: region, filled picture, filled mask and overlay equal diffusers' for any size and mask."""
    assume(mask.any())
    working_height, working_width = height or NATIVE_SIZE, width or NATIVE_SIZE
    image = noise(int(mask.sum()) % 1000, *mask.shape, 3)
    pil_image, pil_mask = Image.fromarray(image), Image.fromarray(mask)

    region = MASK_PROCESSOR.get_crop_region(pil_mask, working_width, working_height, pad=padding)
    result = fitted(image, mask, height, width, padding)
    assert result.placement.window.corners == region

    arguments = {"height": working_height, "width": working_width, "crops_coords": region, "resize_mode": "fill"}
    try:
        stock_image = IMAGE_PROCESSOR.preprocess(pil_image, **arguments)
    except ValueError:
        stock_image = None  # so thin that a side rounds to nothing, which stock does not survive
    if stock_image is None:
        left, top, right, bottom = region
        assert min(right - left, bottom - top) < max(right - left, bottom - top) / 60
        return
    stock_mask = MASK_PROCESSOR.preprocess(pil_mask, **arguments)
    if stock_mask.any() or mask.max() < 128:  # a mask that stock loses is mended on purpose
        assert_same_input(result, stock_image, stock_mask)

    painted = noise(7, working_height, working_width, 3)
    expected = IMAGE_PROCESSOR.apply_overlay(pil_mask, pil_image, Image.fromarray(painted), region)
    assert np.array_equal(overlay(image, mask, result.placement, painted), np.asarray(expected))


@settings(max_examples=80)
@given(mask=masks(), height=NAMED_SIDES, width=NAMED_SIDES)
def test_named_sizes_are_resized_as_stock_does(mask: Pixels, height: int, width: int) -> None:
    """`height` and `width`: picture and mask equal diffusers' resize for any size and mask."""
    image = noise(int(mask.sum()) % 1000, *mask.shape, 3)
    result = fitted(image, mask, height, width, None)
    stock_image = IMAGE_PROCESSOR.preprocess(Image.fromarray(image), height=height, width=width)
    stock_mask = MASK_PROCESSOR.preprocess(Image.fromarray(mask), height=height, width=width)
    if stock_mask.any() or mask.max() < 128:
        assert_same_input(result, stock_image, stock_mask)
    else:
        assert (result.mask >= 128).any()


@pytest.mark.parametrize("side", [8, 64, 128])
def test_pictures_of_the_working_size_are_left_alone(side: int) -> None:
    """A picture that has the working size already reaches the model as stock would pass it on."""
    image, mask = noise(1, side, side, 3), noise(2, side, side)
    result = fitted(image, mask, side, side, None)
    assert np.array_equal(result.image, image)
    assert_same_input(
        result,
        IMAGE_PROCESSOR.preprocess(Image.fromarray(image), height=side, width=side),
        MASK_PROCESSOR.preprocess(Image.fromarray(mask), height=side, width=side),
    )


def test_padded_crop_in_a_mixed_batch(inpainting_checkpoint: Path) -> None:
    """`padding_mask_crop` from upload to answer, beside other requests: what stock answers for the same upload."""
    stock = Stock(inpainting_checkpoint)
    size = stock.pipeline.unet.config.sample_size * 8
    image, mask = noise(5, 150, 210, 3), np.zeros((150, 210), np.uint8)
    image = np.asarray(Image.fromarray(image).resize((21, 15)).resize((210, 150)))
    mask[40:75, 90:150] = 255
    company = mixed_requests(("ddim", "euler_a", "unipc"), 6, size, seed=8)
    params = dataclasses.replace(
        company[0].params, height=size, width=size, num_images_per_prompt=1, num_inference_steps=5, batching="shared"
    )
    fits = [
        fit(image, mask, native_size=size, size_multiple=8, height=None, width=None, padding_mask_crop=padding)
        for padding in (0, 8, 40)
    ]
    crops = [
        InpaintRequest(params, result.image, result.mask, admitted_at=0.0, deadline=float("inf")) for result in fits
    ]
    pipeline = InpaintPipeline(load(Settings(model=str(inpainting_checkpoint)), torch.device("cpu")), "black")
    results, ticks = run_staggered(pipeline, [company[1], crops[0], company[2], crops[1], crops[2], *company[3:]])
    assert max(tick.images for tick in ticks) > 2
    for place, result, padding in zip((1, 3, 4), fits, (0, 8, 40), strict=True):
        expected, _ = stock(
            crops[0],
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask),
            padding_mask_crop=padding,
        )
        answer = overlay(image, mask, result.placement, results[str(place)].images[0])
        assert np.abs(answer.astype(int) - expected[0]).max() <= 1
