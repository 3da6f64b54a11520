"""A real model behind Ray paints what it paints without."""

from pathlib import Path

import httpx
import pytest

from service.engine.engine import WORKER_TARGET
from tests.http.serving import form
from tests.model.checkpoints import make_checkpoint
from tests.process.real_service import serving
from tests.ray.cluster import RayNodes, deployed

pytestmark = pytest.mark.ray


def test_a_real_model_paints_the_same(nodes: RayNodes, tmp_path: Path) -> None:
    """Alone in its batch, a request gives the same bytes from a replica with one core as from `serve` with one."""
    folder = make_checkpoint(tmp_path / "checkpoint")
    fields = {"batching": "solo", "num_inference_steps": "3"}
    with serving(folder) as service:
        files, data = form(**fields)
        direct = httpx.post(f"{service.url}/v1/inpaint", files=files, data=data, timeout=60, trust_env=False)
    with deployed(nodes, {"model": str(folder)}, worker_target=WORKER_TARGET) as app:
        answer = app.inpaint(**fields)
    assert direct.status_code == answer.status_code == 200
    assert answer.content == direct.content
