"""LitServe with its own batching over the stock diffusers pipeline.

    python -m benchmarks.peers.litserve_stock --model FOLDER --port PORT --threads N --max-batch B [--device D]

LitServe collects up to `--max-batch` requests, or what comes within the window.
One call of the stock pipeline has one number of steps, one guidance scale, one
scheduler and one size: requests of a batch that agree in them go into one call, with
a list of prompts and a list of generators, and the other groups take their turns. The
batch is answered when all of it is done. Needs the package litserve.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

import litserve
import torch
from fastapi import HTTPException, Request, Response

from benchmarks.peers import wire
from benchmarks.peers.options import peer_parser, torch_dtype
from benchmarks.peers.stock import StockPipeline, settings_of
from benchmarks.peers.wire import FormError, PeerRequest
from service.request import Pixels

WINDOW_SECONDS = 0.05
GUIDED = 7.5


class StockAPI(litserve.LitAPI):
    """What LitServe runs in its worker process.

    Args:
        model: Folder in diffusers format.
        dtype: Of the weights.
        threads: Of torch.
        max_batch: Requests of a full batch.
    """

    def __init__(self, model: Path, dtype: torch.dtype, threads: int, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=WINDOW_SECONDS, api_path=wire.PATH)
        self._model = model
        self._dtype = dtype
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load and warm up; LitServe is ready after this."""
        torch.set_num_threads(self._threads)
        self._pipeline = StockPipeline(self._model, device, self._dtype)
        for num_images in (1, self.max_batch_size):
            self._pipeline.warm_up([self._pipeline.native_size], [GUIDED], num_images)

    def decode_request(self, request: Request) -> PeerRequest:
        """The form's request. LitServe reads the annotation, but hands over the form."""
        try:
            return wire.read_form(request)
        except FormError as error:
            raise HTTPException(422, str(error)) from error

    def predict(self, x: Sequence[PeerRequest]) -> list[Pixels]:
        """A batch, group by group."""
        groups: dict[Hashable, list[int]] = {}
        for index, request in enumerate(x):
            groups.setdefault(settings_of(request), []).append(index)
        pictures: dict[int, Pixels] = {}
        for indices in groups.values():
            painted = self._pipeline.paint([x[index] for index in indices])
            pictures.update(zip(indices, painted, strict=True))
        return [pictures[index] for index in range(len(x))]

    def encode_response(self, output: Pixels) -> Response:
        """The PNG; the header keeps LitServe from compressing it a second time."""
        return Response(wire.encode(output), media_type=wire.MEDIA_TYPE, headers={"Content-Encoding": "identity"})


def main() -> None:
    """Serve until SIGTERM."""
    parser = peer_parser("LitServe with its own batching over the stock pipeline.")
    parser.add_argument("--max-batch", type=int, default=8, help="requests of a full batch, at least 2")
    arguments = parser.parse_args()
    if arguments.max_batch < 2:
        parser.error("--max-batch must be at least 2: LitServe does not batch otherwise")
    device = torch.device(arguments.device)
    api = StockAPI(
        arguments.model, torch_dtype(arguments.dtype, arguments.device), arguments.threads, arguments.max_batch
    )
    server = litserve.LitServer(
        api,
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        timeout=False,  # Overload is to show as latency, as with the other peers.
        healthcheck_path="/readyz",
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
