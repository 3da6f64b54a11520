"""The VAE, in batches: as it was loaded, or compiled and captured for the native size."""

import copy

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from service.worker.compiled import compiled
from service.worker.graphs import BATCH_SIZES, GraphedFunction

MAX_BATCH = 8
"""Pictures at once; more would only need more memory."""


class Autoencoder:
    """Encodes and decodes. One thread encodes, one decodes.

    Args:
        vae: On its device.
    """

    def __init__(self, vae: AutoencoderKL | AsymmetricAutoencoderKL) -> None:
        self._vae = vae
        self._encode: GraphedFunction | None = None
        self._decode: GraphedFunction | None = None

    @property
    def can_be_captured(self) -> bool:
        """Whether it is stock's plain one, and computes a batch as a whole."""
        return type(self._vae) is AutoencoderKL and not (self._vae.use_slicing or self._vae.use_tiling)

    def encode(self, pictures: torch.Tensor) -> DiagonalGaussianDistribution:
        """What the encoder says of (N, 3, H, W) pictures, N up to `MAX_BATCH`."""
        if self._encode is not None and self._encode.fits(pictures):
            return DiagonalGaussianDistribution(self._encode(pictures))
        posterior: DiagonalGaussianDistribution = self._vae.encode(pictures).latent_dist
        return posterior

    def decode(self, latents: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, 3, H, W) pictures of (N, C, h, w) latents, N up to `MAX_BATCH`.

        Args:
            latents: Unscaled.
            conditions: What an `AsymmetricAutoencoderKL` looks at beside them.
        """
        if self._decode is not None and not conditions and self._decode.fits(latents):
            return self._decode(latents)
        pictures: torch.Tensor = self._vae.decode(latents, return_dict=False, **conditions)[0]
        return pictures

    def in_float32(self) -> "Autoencoder":
        """One whose decoder is a copy of this one's in float32, for numbers that a narrower type does not hold.

        It is for decoding, and takes device memory as long as somebody has it.

        Raises:
            torch.OutOfMemoryError: There is no room for it.
        """
        shared = (self._vae.encoder, self._vae.quant_conv)
        vae = copy.deepcopy(self._vae, {id(part): part for part in shared})
        for part in (vae.post_quant_conv, vae.decoder):
            if part is not None:
                part.float()
        return Autoencoder(vae)

    def capture(self, size: int) -> None:
        """Compile for pictures of size x size, and capture; takes a minute where nothing is cached.

        Where `can_be_captured`, and the weights are laid out for it.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        vae = self._vae
        assert isinstance(vae, AutoencoderKL)  # noqa: S101 - for the type checker: `can_be_captured` says so
        dtype, device = vae.dtype, vae.device
        picture = torch.zeros(1, 3, size, size, dtype=dtype, device=device)
        latents = vae.encode(picture).latent_dist.mean
        decode = compiled(_Decoder(vae))
        encode = compiled(_Encoder(vae))
        self._decode = GraphedFunction(decode, latents, BATCH_SIZES)
        self._encode = GraphedFunction(encode, picture, BATCH_SIZES)


class _Encoder(torch.nn.Module):
    """(N, 3, H, W) pictures to (N, 2 C, h, w) moments."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self._vae = vae

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Without the branches of `AutoencoderKL.encode`."""
        moments: torch.Tensor = self._vae._encode(pictures)  # noqa: SLF001 - its public name is decorated for hooks
        return moments


class _Decoder(torch.nn.Module):
    """(N, C, h, w) latents to (N, 3, H, W) pictures."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self._vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Without the branches of `AutoencoderKL.decode`."""
        pictures: torch.Tensor = self._vae._decode(latents, return_dict=False)[0]  # noqa: SLF001 - as above
        return pictures
