"""LoRAs, textual inversions and tensors over HTTP, with real workers and a real (tiny) model."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service.request import InpaintRequest, InpaintTensors, LoraUse
from tests.model.checkpoints import NATIVE_SIZE, make_checkpoint
from tests.model.embedding_files import diffusers_file, vectors
from tests.model.lora_files import make_lora
from tests.model.rows import Model
from tests.model.stock import Stock
from tests.process.real_service import Service, form_of, pictures, post_all, serving

pytestmark = pytest.mark.timeout(300)

ADMIN = {"Authorization": "Bearer root-key"}
WIDTH = 32


class Setting:
    """A service with folders for adapters, and the stock pipeline of its model."""

    def __init__(self, work: Path) -> None:
        self.checkpoint = make_checkpoint(work / "checkpoint")
        self.loras, self.embeddings, self.uploads = work / "loras", work / "embeddings", work / "uploads"
        self.uploads.mkdir()
        tokens = {"<pirate>": diffusers_file(self.embeddings, "pirate", "<pirate>", vectors(2, WIDTH))}
        self.stock = Stock(self.checkpoint, tokens)
        self.files = {
            name: make_lora(self.uploads / f"{name}.safetensors", self.stock.pipeline, file_format, seed=seed)
            for seed, (name, file_format) in enumerate({"a": "kohya", "b": "locon"}.items())
        }
        self.model = Model(NATIVE_SIZE, WIDTH, self.files, tuple(tokens))

    def serving(self) -> Any:
        """The service."""
        return serving(
            self.checkpoint,
            *("--lora-dir", str(self.loras), "--embeddings-dir", str(self.embeddings)),
            *("--admin-keys", "root-key", "--max-images", "4"),
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("adapters"))


def put(service: Service, name: str, data: bytes) -> httpx.Response:
    return httpx.put(f"{service.url}/v1/adapters/{name}", content=data, headers=ADMIN, timeout=60, trust_env=False)


def wire_loras(loras: tuple[LoraUse, ...]) -> str:
    return json.dumps(
        [
            {"name": lora.name, "scale": {"unet": lora.unet_scale, "text_encoder": lora.text_encoder_scale}}
            for lora in loras
        ]
    )


def post(service: Service, request: InpaintRequest, **changes: str) -> httpx.Response:
    form = form_of(request, **changes)
    return httpx.post(
        f"{service.url}/v1/inpaint", headers={"Accept": "application/json"}, timeout=60, trust_env=False, **form
    )


def assert_equal_to_stock(setting: Setting, request: InpaintRequest, response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    expected, _ = setting.stock(request)
    for picture, wanted in zip(pictures(response), expected, strict=True):
        assert np.abs(picture.astype(int) - wanted).max() <= 1


def lora_names(service: Service) -> list[str]:
    (model,) = service.get("/v1/models").json()["data"]
    return [adapter["name"] for adapter in model["adapters"]]


def test_lora_is_put_used_on_all_workers_and_outlives_the_service(setting: Setting) -> None:
    """An upload serves at once on both workers, in mixed traffic, equals stock, and is there after a restart."""
    model = setting.model
    requests = [
        model.request(loras=loras, seed=seed)
        for seed, loras in enumerate(
            [
                (),
                (model.lora(0, 1.0),),
                (model.lora(1, -0.5, text_encoder_scale=0.7),),
                (model.lora(0, 0.4), model.lora(1, 0.6)),
            ]
            * 3
        )
    ]
    with setting.serving() as service:
        before = post(service, requests[0])
        assert post(service, requests[1], loras=wire_loras(requests[1].params.loras)).json()["code"] == "unknown_lora"
        for name, path in setting.files.items():
            assert put(service, name, path.read_bytes()).status_code == 201
        assert lora_names(service) == ["a", "b"]
        forms = [form_of(one, loras=wire_loras(one.params.loras)) for one in requests]
        responses = asyncio.run(post_all(service, forms))
        for request, response in zip(requests, responses, strict=True):
            assert_equal_to_stock(setting, request, response)
        again = post(service, requests[0])
        assert pictures(again)[0].tobytes() == pictures(before)[0].tobytes()
        assert [service.metric(f'inpaint_worker_restarts_total{{worker="{worker}"}}') for worker in "01"] == [0, 0]
        assert service.end() == 0

    with setting.serving() as service:
        assert lora_names(service) == ["a", "b"]
        assert_equal_to_stock(
            setting, requests[1], post(service, requests[1], loras=wire_loras(requests[1].params.loras))
        )
        for name in setting.files:
            gone = httpx.delete(f"{service.url}/v1/adapters/{name}", headers=ADMIN, timeout=30, trust_env=False)
            assert gone.status_code == 204
        assert post(service, requests[1], loras='[{"name": "a"}]').json()["code"] == "unknown_lora"


@pytest.fixture(scope="module")
def running(setting: Setting) -> Iterator[Service]:
    with setting.serving() as service:
        yield service


@pytest.mark.parametrize("kind", ["pickle", "wide", "truncated", "other"])
def test_bad_loras_are_refused_and_change_nothing(running: Service, setting: Setting, kind: str) -> None:
    """A pickle, another architecture, a cut-off file, no LoRA: 422, nothing is stored, pictures stay what they were."""
    plain = setting.model.request()
    before = pictures(post(running, plain))[0]
    good = setting.files["a"].read_bytes()
    data = {
        "pickle": b"\x80\x04\x95not a tensor",
        "truncated": good[:-7],
        "wide": _wide(setting),
        "other": (setting.checkpoint / "vae" / "diffusion_pytorch_model.safetensors").read_bytes(),
    }[kind]
    response = put(running, "bad", data)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_lora"), response.text
    assert [error["field"] for error in response.json()["errors"]] == ["adapter"]
    assert lora_names(running) == []
    assert [path.name for path in setting.loras.iterdir()] == []
    assert np.array_equal(pictures(post(running, plain))[0], before)


def _wide(setting: Setting) -> bytes:
    folder = make_checkpoint(setting.uploads / "wide", text_width=48)
    return make_lora(setting.uploads / "wide.safetensors", Stock(folder).pipeline).read_bytes()


def test_file_dropped_into_the_folder_that_is_no_lora(running: Service, setting: Setting) -> None:
    """What an operator puts there is checked when it is first asked for: 422 of the field `loras`, workers live on."""
    (setting.loras / "broken.safetensors").write_bytes(b"nonsense")
    response = post(running, setting.model.request(), loras='[{"name": "broken"}]')
    assert (response.status_code, response.json()["code"]) == (422, "invalid_lora")
    assert response.json()["errors"][0]["field"] == "loras"
    (setting.loras / "broken.safetensors").unlink()
    assert post(running, setting.model.request()).status_code == 200


def test_embeddings_and_tensors_over_http(running: Service, setting: Setting) -> None:
    """A textual inversion's token, prompt embeddings, given latents and array answers equal stock."""
    model = setting.model
    (served,) = running.get("/v1/models").json()["data"]
    assert served["embeddings"] == [{"token": "<pirate>", "num_vectors": 2}]
    request = model.request(prompt="a <pirate> house")
    assert_equal_to_stock(setting, request, post(running, request))

    tensors = InpaintTensors(prompt_embeds=model.embeds(), latents=model.latents())
    request = model.request(tensors=tensors, output="latents")
    form = form_of(request, output_format="latent")
    del form["data"]["prompt"]
    for name in ("prompt_embeds", "latents"):
        form["files"][name] = (f"{name}.npy", _npy(getattr(tensors, name)))
    response = httpx.post(
        f"{running.url}/v1/inpaint", headers={"Accept": "application/json"}, timeout=60, trust_env=False, **form
    )
    assert response.status_code == 200, response.text
    latents = np.load(io.BytesIO(base64.b64decode(response.json()["images"][0]["b64_json"])), allow_pickle=False)
    expected, _ = setting.stock(request)
    assert np.abs(latents - expected[0]).max() <= 1 / 255


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
