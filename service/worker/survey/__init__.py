"""What a worker would find: devices, and the model's files. Run in a child process of `inpaint-service doctor`."""

from multiprocessing.connection import Connection

from service.findings import Finding
from service.settings import Settings


def run(connection: Connection, settings: Settings, devices: tuple[str, ...]) -> None:
    """Send one `Finding` after the other, those of a driver that may crash or hang last; then close.

    Args:
        connection: The child's end of the pipe.
        settings: The operator's settings.
        devices: Where workers would be started.
    """
    try:
        # Here, not above: these imports may fail, which is one of the things to find out.
        from service.worker.survey.devices import survey_devices  # noqa: PLC0415
        from service.worker.survey.model import survey_model  # noqa: PLC0415
    except (ImportError, OSError) as error:
        hint = "install the service's requirements anew: pip install -c constraints.txt -e ."
        first_line = (str(error).splitlines() or [""])[0]
        connection.send(Finding("torch", "fail", f"torch and diffusers cannot be imported: {first_line}", hint))
        connection.close()
        return
    for finding in survey_model(settings):
        connection.send(finding)
    for finding in survey_devices(settings, devices):
        connection.send(finding)
    connection.close()
