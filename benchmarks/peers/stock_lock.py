"""The stock diffusers pipeline behind a lock: what most people run.

    python -m benchmarks.peers.stock_lock --model FOLDER --port PORT --threads N [--device D] [--dtype T] [--compile]

One `StableDiffusionInpaintPipeline` with its safety checker on, one request at a
time, PNG in and PNG out, under the path and field names of `POST /v1/inpaint`.
Pictures are decoded and encoded outside the lock.
"""

import torch

from benchmarks.peers.front import Inbox, open_front
from benchmarks.peers.options import peer_parser, torch_dtype
from benchmarks.peers.stock import StockPipeline

GUIDED, UNGUIDED = 7.5, 1.0


def run(pipeline: StockPipeline, inbox: Inbox) -> None:
    """Paint request by request, for ever."""
    while True:
        (waiting,) = inbox.take()
        try:
            waiting.picture.set_result(pipeline.paint([waiting.request])[0])
        except Exception as error:  # noqa: BLE001 - it is one request's, which is answered with 500
            waiting.picture.set_exception(error)


def main() -> None:
    """Load the pipeline, warm it up, serve until SIGTERM."""
    parser = peer_parser("The stock diffusers pipeline behind a lock.")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet and the VAE")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="sides to warm up for; by default the model's own. Others compile late"
    )
    parser.add_argument("--unguided", action="store_true", help="warm up for requests without guidance, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StockPipeline(arguments.model, arguments.device, torch_dtype(arguments.dtype, arguments.device))
    if arguments.compile:
        pipeline.compile()
    scales = (GUIDED, UNGUIDED) if arguments.unguided else (GUIDED,)
    pipeline.warm_up(arguments.sizes or [pipeline.native_size], scales)
    run(pipeline, open_front(arguments.port))


if __name__ == "__main__":
    main()
