"""`inpaint-service inpaint`: who does what was asked for."""

import asyncio
from collections.abc import Mapping

from service.client.command import Command
from service.client.exit_status import ExitStatus
from service.client.failures import WrongUsage
from service.client.folder import paint_folder
from service.client.single import paint_single


def run(command: Command) -> ExitStatus:
    """Paint.

    Raises:
        WrongUsage: Nothing was sent.
        KeyboardInterrupt: The user does not want it any more; what has not been sent a key is cancelled.
    """
    _check_texts(command.fields)
    if command.is_folder:
        return asyncio.run(paint_folder(command))
    return asyncio.run(paint_single(command))


def _check_texts(fields: Mapping[str, str]) -> None:
    """What a terminal sends in another encoding than it says cannot be sent on."""
    for name, text in fields.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise WrongUsage(f"--{name.replace('_', '-')} is not valid text") from None
